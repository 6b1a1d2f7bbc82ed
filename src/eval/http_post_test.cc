#include "eval/http_post.h"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdlib>
#include <memory>
#include <nlohmann/json.hpp>
#include <thread>

#include "base/file.h"
#include "base/test_folder.h"
#include "base/testing.h"
#include "eval/mt_bench.h"

namespace cambium {
namespace {

using ::testing::ElementsAre;
using testing::error_of;
using ::testing::HasSubstr;
using testing::message_of;

using Key = std::unique_ptr<EVP_PKEY, void (*)(EVP_PKEY*)>;
using Certificate = std::unique_ptr<X509, void (*)(X509*)>;

constexpr long kDay = 24 * 60 * 60;

/// Signs certificates, its own first.
class Authority {
 public:
  explicit Authority(const std::string& name)
      : name_(name),
        key_(EVP_EC_gen("P-256"), EVP_PKEY_free),
        own_(sign(name, key_.get(), NID_basic_constraints, "critical,CA:TRUE", kDay)) {}

  std::string pem() const {
    const std::unique_ptr<BIO, int (*)(BIO*)> text(BIO_new(BIO_s_mem()), BIO_free);
    PEM_write_bio_X509(text.get(), own_.get());
    char* at = nullptr;
    const long size = BIO_get_mem_data(text.get(), &at);
    return {at, static_cast<size_t>(size)};
  }
  /// A certificate for `names` ("DNS:a,IP:127.0.0.1") that is valid for so many seconds from now.
  Certificate certificate(EVP_PKEY* key, const std::string& names, long seconds) const {
    return sign("server", key, NID_subject_alt_name, names, seconds);
  }

 private:
  Certificate sign(const std::string& subject, EVP_PKEY* key, int extension,
                   const std::string& value, long seconds) const {
    Certificate out(X509_new(), X509_free);
    X509_set_version(out.get(), X509_VERSION_3);
    ASN1_INTEGER_set(X509_get_serialNumber(out.get()), subject == name_ ? 1 : 2);
    X509_gmtime_adj(X509_getm_notBefore(out.get()), -2 * kDay);
    X509_gmtime_adj(X509_getm_notAfter(out.get()), seconds);
    X509_set_pubkey(out.get(), key);
    for (const auto& [entry, name] : {std::pair{X509_get_subject_name(out.get()), subject},
                                      std::pair{X509_get_issuer_name(out.get()), name_}}) {
      X509_NAME_add_entry_by_txt(entry, "CN", MBSTRING_ASC,
                                 reinterpret_cast<const unsigned char*>(name.c_str()), -1, -1, 0);
    }
    X509_EXTENSION* made = X509V3_EXT_conf_nid(nullptr, nullptr, extension, value.c_str());
    X509_add_ext(out.get(), made, -1);
    X509_EXTENSION_free(made);
    EXPECT_GT(X509_sign(out.get(), key_.get(), EVP_sha256()), 0);
    return out;
  }
  std::string name_;
  Key key_;
  Certificate own_;
};

/// What a server shows who speaks TLS.
using Identity = std::unique_ptr<SSL_CTX, void (*)(SSL_CTX*)>;

Identity identity_of(const Authority& authority, const std::string& names, long seconds = kDay) {
  Identity out(SSL_CTX_new(TLS_server_method()), SSL_CTX_free);
  const Key key(EVP_EC_gen("P-256"), EVP_PKEY_free);
  SSL_CTX_use_PrivateKey(out.get(), key.get());
  SSL_CTX_use_certificate(out.get(), authority.certificate(key.get(), names, seconds).get());
  return out;
}

Identity no_identity() {
  return {nullptr, SSL_CTX_free};
}

/// A port of this machine that is listened to.
struct Listener {
  Listener() {
    socket = ::socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof(address);
    EXPECT_EQ(bind(socket, reinterpret_cast<sockaddr*>(&address), size), 0);
    EXPECT_EQ(listen(socket, 8), 0);
    getsockname(socket, reinterpret_cast<sockaddr*>(&address), &size);
    port = std::to_string(ntohs(address.sin_port));
  }
  ~Listener() { close(socket); }
  Listener(const Listener&) = delete;
  Listener& operator=(const Listener&) = delete;

  int socket;
  std::string port;
};

/// One end of an accepted connection, with TLS or without.
class Connection {
 public:
  Connection(int socket, SSL_CTX* identity) : socket_(socket), ssl_(nullptr, SSL_free) {
    if (identity != nullptr) {
      ssl_.reset(SSL_new(identity));
      SSL_set_fd(ssl_.get(), socket);
      ready_ = SSL_accept(ssl_.get()) == 1;
    }
  }
  ~Connection() { close(socket_); }
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  bool ready() const { return ready_; }
  ssize_t receive(char* to, int size) {
    return ssl_ ? SSL_read(ssl_.get(), to, size) : read(socket_, to, static_cast<size_t>(size));
  }
  ssize_t send(const std::string& text) {
    return ssl_ ? SSL_write(ssl_.get(), text.data(), static_cast<int>(text.size()))
                : write(socket_, text.data(), text.size());
  }

 private:
  int socket_;
  std::unique_ptr<SSL, void (*)(SSL*)> ssl_;
  bool ready_ = true;
};

/// Answers one connection after the other with the given replies, then closes. A connection that
/// refuses its identity is over and counts.
class Server {
 public:
  explicit Server(std::vector<std::string> replies, Identity identity = no_identity())
      : replies_(std::move(replies)),
        identity_(std::move(identity)),
        thread_([this] { serve(); }) {}
  ~Server() { thread_.join(); }
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;
  std::string url(const std::string& host = "127.0.0.1") const {
    return (identity_ ? "https://" : "http://") + host + ":" + listener_.port;
  }
  /// Of the requests, once all came.
  const std::vector<std::string>& seen() const { return seen_; }

 private:
  void serve() {
    for (const std::string& reply : replies_) {
      Connection connection(accept(listener_.socket, nullptr, nullptr), identity_.get());
      if (!connection.ready()) {
        continue;
      }
      std::string request;
      size_t whole = std::string::npos;
      char piece[4096];
      while (request.size() < whole) {
        const ssize_t got = connection.receive(piece, sizeof(piece));
        if (got <= 0) {
          break;
        }
        request.append(piece, static_cast<size_t>(got));
        if (request.front() == 0x16) {  // who speaks TLS waits for an answer
          break;
        }
        const size_t head = request.find("\r\n\r\n");
        const size_t length = request.find("Content-Length: ");
        if (head != std::string::npos && length != std::string::npos) {
          whole = head + 4 + std::stoul(request.substr(length + 16));
        }
      }
      seen_.push_back(request);
      connection.send(reply);
    }
  }
  std::vector<std::string> replies_, seen_;
  Identity identity_;
  Listener listener_;
  std::thread thread_;  // last: it uses the others
};

std::string reply(int status, const std::string& body) {
  return "HTTP/1.1 " + std::to_string(status) +
         " X\r\nContent-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body;
}

std::string completion(const std::string& content) {
  return reply(200, nlohmann::json({{"choices", {{{"message", {{"content", content}}}}}}}).dump());
}

TEST(HttpPost, ReadsAddresses) {
  struct Row {
    const char* url;
    const char* host;
    const char* port;
    const char* path;
  };
  for (const Row& row : {Row{"http://a", "a", "80", "/v1/chat/completions"},
                         Row{"http://a:8000/v1/", "a", "8000", "/v1/chat/completions"},
                         Row{"http://a/x/chat/completions", "a", "80", "/x/chat/completions"},
                         Row{"https://a/v1", "a", "443", "/v1/chat/completions"},
                         Row{"http://[::1]:80/v1", "::1", "80", "/v1/chat/completions"}}) {
    const HttpAddress address = parse_chat_address(row.url);
    EXPECT_EQ(address.tls, std::string(row.url).starts_with("https"));
    EXPECT_EQ(address.host, row.host);
    EXPECT_EQ(address.port, row.port);
    EXPECT_EQ(address.path, row.path);
  }
  for (const auto& [url, whole] :
       {std::pair{"http://a:80", "http://a/v1/chat/completions"},
        std::pair{"https://a:80", "https://a:80/v1/chat/completions"},
        std::pair{"https://[::1]", "https://[::1]/v1/chat/completions"}}) {
    EXPECT_EQ(parse_chat_address(url).url(), whole);
  }
  for (const char* url : {"http://localhost:1", "http://127.0.0.2", "http://[::1]"}) {
    EXPECT_TRUE(parse_chat_address(url).local());
  }
  for (const char* url : {"", "a:80", "https://", "ftp://a", "http://", "http://a:b",
                          "http://a:123456", "http://a b", "http://a/\r\nX: y", "http://:80"}) {
    EXPECT_THAT(message_of([&] { parse_chat_address(url); }), HasSubstr("expected an address"))
        << url;
  }
}

TEST(HttpPost, AsksAgainWhatFailsForAMoment) {
  Server server({reply(503, "busy"), completion("Rating: [[7]]"), completion("\xC3\xA9")});
  const Asker judge = ask_address(server.url(), "judge", "secret", 99, 10.0);
  EXPECT_THAT(judge({{{{"user", "How \"good\"?\n"}}, 0.5}, {{{"user", "b"}}, 0.0}}),
              ElementsAre("Rating: [[7]]", "\xC3\xA9"));
  const std::string request = server.seen()[1];
  EXPECT_THAT(request, HasSubstr("POST /v1/chat/completions HTTP/1.1\r\n"));
  EXPECT_THAT(request, HasSubstr("Authorization: Bearer secret\r\n"));
  const auto body = nlohmann::json::parse(request.substr(request.find("\r\n\r\n")));
  EXPECT_EQ(body["messages"][0]["content"], "How \"good\"?\n");
  EXPECT_EQ(body["model"], "judge");
  EXPECT_EQ(body["max_tokens"], 99);
  EXPECT_EQ(body["temperature"], 0.5);
}

TEST(HttpPost, BadServersAreNamed) {
  struct Row {
    std::string reply;
    const char* message;
  };
  for (const Row& row : {Row{reply(401, "no key"),
                             "got status 401: no key; the server's key is read from "
                             "CAMBIUM_JUDGE_KEY"},
                         Row{reply(200, "{}"), "expected a chat completion"},
                         Row{reply(200, R"({"choices": [{"message": {"content": null}}]})"),
                             "expected a chat completion"},
                         Row{reply(200, "<html>"), "expected a chat completion"}}) {
    Server server({row.reply});
    const Asker judge = ask_address(server.url(), "j", "", 9, 10.0);
    EXPECT_THAT(message_of([&] { judge({{{{"user", "a"}}, 0.0}}); }), HasSubstr(row.message));
  }
  Server garbage(
      {"not HTTP at all\r\n\r\n", "", "HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nshort"});
  const Asker judge = ask_address(garbage.url(), "j", "", 9, 10.0);
  EXPECT_THAT(message_of([&] { judge({{{{"user", "a"}}, 0.0}}); }), HasSubstr("http://127.0.0.1:"));
  const Asker nobody = ask_address("http://127.0.0.1:1", "j", "", 9, 1.0);
  EXPECT_THAT(message_of([&] {
                nobody({{{{"user", "a"}}, 0.0}});
              }),
              HasSubstr("Connection refused"));
}

/// What came of asking `url` once, within a second.
std::string asked(const std::string& url) {
  std::string body;
  const std::string message =
      message_of([&] { body = http_post(parse_chat_address(url), "{}", "secret", 1.0).body; });
  return body.empty() ? message : body;
}

TEST(HttpPost, AsksByTlsWhomTheSystemTrusts) {
  const TestFolder folder;
  const Authority known("known");
  const Authority stranger("stranger");
  write_file_atomically(folder.at("known.pem"), known.pem());
  write_file_atomically(folder.at("empty.pem"), "");
  ::setenv("SSL_CERT_FILE", folder.at("known.pem").c_str(), 1);
  struct Row {
    const Authority& authority;
    const char* names;
    const char* host;
    long seconds;
    const char* wanted;
  };
  for (const Row& row :
       {Row{known, "IP:127.0.0.1", "127.0.0.1", kDay, "answer"},
        Row{known, "DNS:other,DNS:localhost", "localhost", kDay, "answer"},
        Row{known, "IP:127.0.0.1", "localhost", kDay,
            "expected a certificate for 'localhost', got one for IP Address:127.0.0.1"},
        Row{known, "DNS:localhost,DNS:other", "127.0.0.1", kDay,
            "expected a certificate for '127.0.0.1', got one for DNS:localhost, DNS:other"},
        Row{known, "IP:127.0.0.1", "127.0.0.1", -kDay, "certificate has expired"},
        Row{stranger, "IP:127.0.0.1", "127.0.0.1", kDay,
            "expected a certificate of an authority that this system trusts"}}) {
    Server server({reply(200, "answer")}, identity_of(row.authority, row.names, row.seconds));
    const std::string url = server.url(row.host);
    EXPECT_THAT(asked(url), HasSubstr(row.wanted));
  }
  {
    Server server({completion("Rating: [[7]]")}, identity_of(known, "IP:127.0.0.1"));
    EXPECT_THAT(ask_address(server.url(), "j", "secret", 9, 10.0)({{{{"user", "a"}}, 0.0}}),
                ElementsAre("Rating: [[7]]"));
    EXPECT_THAT(server.seen()[0], HasSubstr("Authorization: Bearer secret\r\n"));
  }
  ::setenv("SSL_CERT_FILE", folder.at("empty.pem").c_str(), 1);
  EXPECT_THAT(asked("https://127.0.0.1:1"),
              HasSubstr("SSL_CERT_FILE: expected a file with certificates in PEM, got '"));
  ::unsetenv("SSL_CERT_FILE");
  Server server({reply(200, "answer")}, identity_of(known, "IP:127.0.0.1"));
  EXPECT_THAT(asked(server.url()),
              HasSubstr("or name the authority's file (PEM) in SSL_CERT_FILE"));
}

TEST(HttpPost, SaysThatAKeyGoesInTheClear) {
  const auto said = [](const std::string& url, const std::string& key) {
    ::testing::internal::CaptureStderr();
    ask_address(url, "j", key, 9, 1.0);
    return ::testing::internal::GetCapturedStderr();
  };
  EXPECT_THAT(said("http://judge.example/v1", "secret"),
              HasSubstr("http://judge.example/v1: without TLS the key"));
  EXPECT_EQ(said("http://judge.example/v1", ""), "");
  EXPECT_EQ(said("https://judge.example/v1", "secret"), "");
  EXPECT_EQ(said("http://127.0.0.1:8000", "secret"), "");
}

TEST(HttpPost, SaysWhyThereIsNoTls) {
  Server plain({reply(400, "speak plainly")});
  EXPECT_THAT(asked("https" + plain.url().substr(4)),
              AllOf(HasSubstr("https://127.0.0.1:"), HasSubstr("expected a server that speaks TLS"),
                    HasSubstr("is it http://?")));
  EXPECT_THAT(asked("https://127.0.0.1:1"), HasSubstr("Connection refused"));
  const Authority known("known");
  Server server({reply(200, "answer")}, identity_of(known, "IP:127.0.0.1"));
  EXPECT_NE(asked("http" + server.url().substr(5)), "answer");
  // Whoever connects is taken by the system; nobody answers.
  const Listener silent;
  const HttpAddress at{true, "127.0.0.1", silent.port, "/v1"};
  EXPECT_THAT(error_of([&] { http_post(at, "{}", "", 0.1); }), HasSubstr("no answer within 0.1 s"));
}

}  // namespace
}  // namespace cambium
