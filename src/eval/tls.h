// Whom a TLS connection trusts: the certificates of this system, for the host that was asked. All
// of OpenSSL's own calls are here; http_post.cc moves the bytes.
#pragma once

#include <string>

struct ssl_ctx_st;
struct ssl_st;
struct x509_store_ctx_st;

namespace cambium {

/// TLS 1.2 or later, and a peer whose certificate one of this system's authorities signed: those of
/// SSL_CERT_FILE and SSL_CERT_DIR where set (OpenSSL reads them), else of where OpenSSL was built
/// to look, else of where other systems keep theirs. Error where SSL_CERT_FILE names a file without
/// a certificate in it.
void trust_system(ssl_ctx_st* context);

/// The peer's certificate must name `host`, a name or an address in digits.
void expect_host(ssl_st* connection, const std::string& host);

/// Why the certificate at hand is refused, and what to do: for a callback of its verification.
std::string why_refused(x509_store_ctx_st* verification, const std::string& host);

}  // namespace cambium
