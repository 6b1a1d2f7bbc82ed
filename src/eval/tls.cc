#include "eval/tls.h"

#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>

#include <cstdlib>
#include <filesystem>
#include <memory>

#include "base/error.h"

namespace cambium {
namespace {

bool has_certificates(const std::filesystem::path& place) {
  std::error_code error;
  return std::filesystem::is_directory(place, error)
             ? !std::filesystem::is_empty(place, error) && !error
             : std::filesystem::exists(place, error);
}

// The binary also runs on systems other than the one whose OpenSSL is linked into it.
constexpr const char* kBundles[] = {
    "/etc/ssl/certs/ca-certificates.crt",                 // Debian, Ubuntu, Arch, Alpine
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",  // Fedora, RHEL
    "/etc/pki/tls/certs/ca-bundle.crt",                   // their older versions
    "/etc/ssl/ca-bundle.pem",                             // SUSE
};

/// The names a certificate is for, as text.
std::string names_of(const X509* certificate) {
  const std::unique_ptr<GENERAL_NAMES, void (*)(GENERAL_NAMES*)> names(
      static_cast<GENERAL_NAMES*>(
          X509_get_ext_d2i(certificate, NID_subject_alt_name, nullptr, nullptr)),
      GENERAL_NAMES_free);
  const std::unique_ptr<BIO, int (*)(BIO*)> text(BIO_new(BIO_s_mem()), BIO_free);
  for (int i = 0; names && i < sk_GENERAL_NAME_num(names.get()); ++i) {
    BIO_puts(text.get(), i > 0 ? ", " : "");
    GENERAL_NAME_print(text.get(), sk_GENERAL_NAME_value(names.get(), i));
  }
  char* at = nullptr;
  const long size = BIO_get_mem_data(text.get(), &at);
  return size > 0 ? std::string(at, static_cast<size_t>(size)) : "no name";
}

}  // namespace

void trust_system(ssl_ctx_st* context) {
  SSL_CTX_set_min_proto_version(context, TLS1_2_VERSION);
  SSL_CTX_set_verify(context, SSL_VERIFY_PEER, nullptr);
  const char* file = std::getenv(X509_get_default_cert_file_env());
  if (file != nullptr) {
    const bool read = SSL_CTX_load_verify_file(context, file) == 1;
    ERR_clear_error();
    expect(read, "SSL_CERT_FILE: expected a file with certificates in PEM, got '{}'", file);
  }
  SSL_CTX_set_default_verify_paths(context);
  if (file != nullptr || std::getenv(X509_get_default_cert_dir_env()) != nullptr ||
      has_certificates(X509_get_default_cert_file()) ||
      has_certificates(X509_get_default_cert_dir())) {
    return;
  }
  for (const char* bundle : kBundles) {
    if (SSL_CTX_load_verify_file(context, bundle) == 1) {
      break;
    }
  }
  ERR_clear_error();
}

void expect_host(ssl_st* connection, const std::string& host) {
  X509_VERIFY_PARAM* wanted = SSL_get0_param(connection);
  if (X509_VERIFY_PARAM_set1_ip_asc(wanted, host.c_str()) == 1) {
    return;
  }
  X509_VERIFY_PARAM_set_hostflags(wanted, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
  X509_VERIFY_PARAM_set1_host(wanted, host.c_str(), host.size());
  // What SSL_set_tlsext_host_name stands for: a server with several names picks its certificate.
  std::string name = host;
  SSL_ctrl(connection, SSL_CTRL_SET_TLSEXT_HOSTNAME, TLSEXT_NAMETYPE_host_name, name.data());
}

std::string why_refused(x509_store_ctx_st* verification, const std::string& host) {
  const int error = X509_STORE_CTX_get_error(verification);
  const std::string reason = X509_verify_cert_error_string(error);
  switch (error) {
    case X509_V_ERR_HOSTNAME_MISMATCH:
    case X509_V_ERR_IP_ADDRESS_MISMATCH:
      return fmt::format("expected a certificate for '{}', got one for {}; ask by a name it has",
                         host, names_of(X509_STORE_CTX_get0_cert(verification)));
    case X509_V_ERR_CERT_HAS_EXPIRED:
    case X509_V_ERR_CERT_NOT_YET_VALID:
      return fmt::format(
          "expected a certificate of today, got: {}; renew it, or set this machine's clock",
          reason);
    case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT:
    case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY:
    case X509_V_ERR_SELF_SIGNED_CERT_IN_CHAIN:
    case X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT:
    case X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE:
      return fmt::format(
          "expected a certificate of an authority that this system trusts, got: {}; install the "
          "package ca-certificates, or name the authority's file (PEM) in SSL_CERT_FILE",
          reason);
    default:
      return fmt::format("its certificate cannot be trusted: {}", reason);
  }
}

}  // namespace cambium
