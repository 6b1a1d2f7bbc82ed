// One POST of JSON to a server, by http or https (eval/tls.h says who is trusted): how a judge
// behind an OpenAI-compatible address is asked.
#pragma once

#include <cstdint>
#include <string>

namespace cambium {

struct HttpAddress {
  bool tls = false;
  std::string host;  // an IPv6 address without its brackets
  std::string port;
  std::string path;  // of chat completions

  /// "HOST[:PORT]", as the header of that name has it.
  std::string authority() const;
  std::string url() const;
  /// Of this machine, by its name.
  bool local() const { return host == "localhost" || host == "::1" || host.starts_with("127."); }
};

/// "http[s]://HOST[:PORT][/v1[/chat/completions]]"; what is left away is filled in. Error for
/// anything else.
HttpAddress parse_chat_address(const std::string& url);

struct HttpReply {
  int status = 0;
  std::string body;
};

/// Sends `body` and waits for the whole reply; `key` becomes "Authorization: Bearer KEY" where it
/// is not empty. Error that names the address when it cannot be reached, is not who it should be or
/// does not answer within `seconds`, or the answer is larger than 64 MiB.
HttpReply http_post(const HttpAddress& address, const std::string& body, const std::string& key,
                    double seconds);

}  // namespace cambium
