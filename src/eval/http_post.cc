#include "eval/http_post.h"

#include <algorithm>
#include <boost/asio/connect.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <chrono>

#include "base/error.h"

namespace cambium {
namespace {

namespace beast = boost::beast;
namespace http = beast::http;
using boost::asio::ip::tcp;

constexpr uint64_t kLargestReply = uint64_t{64} << 20;

/// The steps of one exchange, each begun when the one before is done; the first error ends it.
class Exchange {
 public:
  Exchange(const HttpAddress& address, const std::string& body, const std::string& key,
           std::chrono::milliseconds limit)
      : resolver_(context_), stream_(context_), limit_(limit) {
    request_.method(http::verb::post);
    request_.target(address.path);
    request_.version(11);
    request_.set(http::field::host, address.host + ":" + address.port);
    request_.set(http::field::content_type, "application/json");
    request_.set(http::field::connection, "close");
    if (!key.empty()) {
      request_.set(http::field::authorization, "Bearer " + key);
    }
    request_.body() = body;
    request_.prepare_payload();
    parser_.body_limit(kLargestReply);
    resolver_.async_resolve(address.host, address.port, [this](auto error, auto found) {
      if (!failed(error)) {
        stream_.expires_after(limit_);
        stream_.async_connect(found, [this](auto e, auto&&) { connected(e); });
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
  HttpReply reply() { return {static_cast<int>(parser_.get().result_int()), parser_.get().body()}; }

 private:
  bool failed(beast::error_code error) {
    error_ = error;
    return static_cast<bool>(error);
  }
  void connected(beast::error_code error) {
    if (!failed(error)) {
      http::async_write(stream_, request_, [this](auto e, size_t) { written(e); });
    }
  }
  void written(beast::error_code error) {
    if (!failed(error)) {
      http::async_read(stream_, buffer_, parser_, [this](auto e, size_t) { done_ = !failed(e); });
    }
  }

  boost::asio::io_context context_;
  tcp::resolver resolver_;
  beast::tcp_stream stream_;
  std::chrono::milliseconds limit_;
  http::request<http::string_body> request_;
  beast::flat_buffer buffer_;
  http::response_parser<http::string_body> parser_;
  beast::error_code error_;
  bool done_ = false;
};

}  // namespace

HttpAddress parse_chat_address(const std::string& url) {
  constexpr std::string_view kHttp = "http://";
  expect(!url.starts_with("https://"),
         "{}: TLS is not built in; reach the judge through a tunnel or a proxy on this machine, as "
         "http://127.0.0.1:PORT/v1",
         url);
  expect(url.starts_with(kHttp), "expected an address as http://HOST:PORT/v1, got '{}'", url);
  const std::string rest = url.substr(kHttp.size());
  const size_t slash = std::min(rest.find('/'), rest.size());
  HttpAddress out{rest.substr(0, slash), "80", rest.substr(slash)};
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
         "expected an address as http://HOST:PORT/v1, got '{}'", url);
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
  expect(!error, "http://{}:{}{}: {}", address.host, address.port, address.path,
         error == beast::error::timeout ? fmt::format("no answer within {:g} s", seconds)
                                        : error.message());
  return exchange.reply();
}

}  // namespace cambium
