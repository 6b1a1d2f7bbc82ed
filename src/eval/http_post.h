// One POST of JSON to a server: how a judge behind an OpenAI-compatible address is asked. Without
// TLS: a judge on another machine is reached through a tunnel or a proxy on this one.
#pragma once

#include <cstdint>
#include <string>

namespace cambium {

struct HttpAddress {
  std::string host;
  std::string port;
  std::string path;  // of chat completions
};

/// "http://HOST[:PORT][/v1[/chat/completions]]"; what is left away is filled in. Error for anything
/// else, https among it.
HttpAddress parse_chat_address(const std::string& url);

struct HttpReply {
  int status = 0;
  std::string body;
};

/// Sends `body` and waits for the whole reply; `key` becomes "Authorization: Bearer KEY" where it
/// is not empty. Error that names the address when it cannot be reached or does not answer within
/// `seconds`, or the answer is larger than 64 MiB.
HttpReply http_post(const HttpAddress& address, const std::string& body, const std::string& key,
                    double seconds);

}  // namespace cambium
