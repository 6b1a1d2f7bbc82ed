#include "eval/http_post.h"

#include <algorithm>
#include <boost/asio/connect.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ssl.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <chrono>
#include <string_view>

#include "base/error.h"
#include "eval/tls.h"

namespace cambium {
namespace {

namespace beast = boost::beast;
namespace http = beast::http;
namespace ssl = boost::asio::ssl;

constexpr uint64_t kLargestReply = uint64_t{64} << 20;

/// The steps of one exchange, each begun when the one before is done; the first error ends it.
class Exchange {
 public:
  Exchange(const HttpAddress& address, const std::string& body, const std::string& key,
           std::chrono::milliseconds limit)
      : tls_(address.tls),
        trust_(trust(address.tls)),
        resolver_(context_),
        stream_(context_, trust_),
        limit_(limit) {
    request_.method(http::verb::post);
    request_.target(address.path);
    request_.version(11);
    request_.set(http::field::host, address.authority());
    request_.set(http::field::content_type, "application/json");
    request_.set(http::field::connection, "close");
    if (!key.empty()) {
      request_.set(http::field::authorization, "Bearer " + key);
    }
    request_.body() = body;
    request_.prepare_payload();
    parser_.body_limit(kLargestReply);
    if (tls_) {
      expect_host(stream_.native_handle(), address.host);
      stream_.set_verify_callback([this, host = address.host](bool ok, ssl::verify_context& at) {
        if (!ok) {
          refused_ = why_refused(at.native_handle(), host);
        }
        return ok;
      });
    }
    resolver_.async_resolve(address.host, address.port, [this](auto error, auto found) {
      if (!failed(error)) {
        tcp().expires_after(limit_);
        tcp().async_connect(found, [this](auto e, auto&&) { connected(e); });
      }
    });
  }

  /// The error that ended it; none where the reply is whole.
  beast::error_code run() {
    context_.run_for(limit_ + std::chrono::seconds(1));
    if (!done_ && !error_) {
      error_ = beast::error::timeout;
    }
    return error_;
  }
  /// What was wrong with the server's certificate; "" where nothing was.
  const std::string& refused() const { return refused_; }
  HttpReply reply() { return {static_cast<int>(parser_.get().result_int()), parser_.get().body()}; }

 private:
  static ssl::context trust(bool tls) {
    ssl::context out(ssl::context::tls_client);
    if (tls) {
      trust_system(out.native_handle());
    }
    return out;
  }
  beast::tcp_stream& tcp() { return stream_.next_layer(); }
  bool failed(beast::error_code error) {
    error_ = error;
    return static_cast<bool>(error);
  }
  void connected(beast::error_code error) {
    if (failed(error)) {
      return;
    }
    if (tls_) {
      stream_.async_handshake(ssl::stream_base::client, [this](auto e) {
        if (!failed(e)) {
          send(stream_);
        }
      });
    } else {
      send(tcp());
    }
  }
  template <class Stream>
  void send(Stream& stream) {
    http::async_write(stream, request_, [this, &stream](auto error, size_t) {
      if (!failed(error)) {
        http::async_read(stream, buffer_, parser_, [this](auto e, size_t) { done_ = !failed(e); });
      }
    });
  }

  bool tls_;
  boost::asio::io_context context_;
  ssl::context trust_;  // before the stream, which takes over whom it trusts
  boost::asio::ip::tcp::resolver resolver_;
  ssl::stream<beast::tcp_stream> stream_;
  std::chrono::milliseconds limit_;
  http::request<http::string_body> request_;
  beast::flat_buffer buffer_;
  http::response_parser<http::string_body> parser_;
  beast::error_code error_;
  std::string refused_;
  bool done_ = false;
};

std::string told(beast::error_code error, double seconds) {
  if (error == beast::error::timeout) {
    return fmt::format("no answer within {:g} s", seconds);
  }
  // What a server says first that has no TLS is no TLS record.
  return error.category() == boost::asio::error::get_ssl_category()
             ? fmt::format(
                   "expected a server that speaks TLS 1.2 or later, got: {}; is it http://?",
                   error.message())
             : error.message();
}

}  // namespace

std::string HttpAddress::authority() const {
  const std::string name = host.find(':') == std::string::npos ? host : "[" + host + "]";
  return port == (tls ? "443" : "80") ? name : name + ":" + port;
}

std::string HttpAddress::url() const {
  return (tls ? "https://" : "http://") + authority() + path;
}

HttpAddress parse_chat_address(const std::string& url) {
  const bool tls = url.starts_with("https://");
  const size_t scheme = tls ? 8 : 7;
  const auto wrong = [&url] {
    return fmt::format("expected an address as https://HOST/v1 or http://HOST:PORT/v1, got '{}'",
                       url);
  };
  expect(tls || url.starts_with("http://"), "{}", wrong());
  const std::string rest = url.substr(scheme);
  const size_t slash = std::min(rest.find('/'), rest.size());
  HttpAddress out{tls, rest.substr(0, slash), tls ? "443" : "80", rest.substr(slash)};
  const size_t colon = out.host.rfind(':');
  if (colon != std::string::npos && !out.host.ends_with(']')) {
    out.port = out.host.substr(colon + 1);
    out.host.resize(colon);
  }
  if (out.host.starts_with('[') && out.host.ends_with(']')) {
    out.host = out.host.substr(1, out.host.size() - 2);
  }
  const auto plain = [](char c) { return c > ' ' && c < '\x7f'; };
  expect(!out.host.empty() && !out.port.empty() && out.port.size() <= 5 &&
             out.port.find_first_not_of("0123456789") == std::string::npos &&
             std::all_of(url.begin(), url.end(), plain),
         "{}", wrong());
  while (out.path.ends_with('/')) {
    out.path.pop_back();
  }
  constexpr std::string_view kRoute = "/chat/completions";
  if (out.path.empty()) {
    out.path = "/v1";
  }
  if (!out.path.ends_with(kRoute)) {
    out.path += kRoute;
  }
  return out;
}

HttpReply http_post(const HttpAddress& address, const std::string& body, const std::string& key,
                    double seconds) {
  Exchange exchange(address, body, key,
                    std::chrono::milliseconds(static_cast<int64_t>(seconds * 1000)));
  const beast::error_code error = exchange.run();
  if (error) {
    fail("{}: {}", address.url(),
         exchange.refused().empty() ? told(error, seconds) : exchange.refused());
  }
  return exchange.reply();
}

}  // namespace cambium
