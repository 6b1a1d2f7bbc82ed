#include "eval/mt_bench.h"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <sys/socket.h>
#include <unistd.h>

#include <nlohmann/json.hpp>
#include <thread>

#include "base/file.h"
#include "base/test_folder.h"
#include "base/testing.h"
#include "eval/http_post.h"

namespace cambium {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::message_of;

/// Answers one connection after the other with the given replies, then closes.
class Server {
 public:
  explicit Server(std::vector<std::string> replies) : replies_(std::move(replies)) {
    listen_ = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof(address);
    EXPECT_EQ(bind(listen_, reinterpret_cast<sockaddr*>(&address), size), 0);
    EXPECT_EQ(listen(listen_, 8), 0);
    getsockname(listen_, reinterpret_cast<sockaddr*>(&address), &size);
    port_ = ntohs(address.sin_port);
    thread_ = std::thread([this] { serve(); });
  }
  ~Server() {
    thread_.join();
    close(listen_);
  }
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;
  std::string url() const { return "http://127.0.0.1:" + std::to_string(port_); }
  /// Of the requests, once all came.
  const std::vector<std::string>& seen() const { return seen_; }

 private:
  void serve() {
    for (const std::string& reply : replies_) {
      const int connection = accept(listen_, nullptr, nullptr);
      std::string request;
      size_t whole = std::string::npos;
      char piece[4096];
      while (request.size() < whole) {
        const ssize_t got = read(connection, piece, sizeof(piece));
        if (got <= 0) {
          break;
        }
        request.append(piece, static_cast<size_t>(got));
        const size_t head = request.find("\r\n\r\n");
        const size_t length = request.find("Content-Length: ");
        if (head != std::string::npos && length != std::string::npos) {
          whole = head + 4 + std::stoul(request.substr(length + 16));
        }
      }
      seen_.push_back(request);
      EXPECT_GE(write(connection, reply.data(), reply.size()), 0);
      close(connection);
    }
  }
  std::vector<std::string> replies_, seen_;
  int listen_ = -1;
  uint16_t port_ = 0;
  std::thread thread_;
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
                         Row{"http://[::1]:80/v1", "::1", "80", "/v1/chat/completions"}}) {
    const HttpAddress address = parse_chat_address(row.url);
    EXPECT_EQ(address.host, row.host);
    EXPECT_EQ(address.port, row.port);
    EXPECT_EQ(address.path, row.path);
  }
  for (const char* url : {"", "a:80", "http://", "http://a:b", "http://a:123456", "http://a b",
                          "http://a/\r\nX: y", "http://:80"}) {
    EXPECT_THAT(message_of([&] { parse_chat_address(url); }), HasSubstr("expected an address"))
        << url;
  }
  EXPECT_THAT(message_of([] { parse_chat_address("https://a"); }),
              HasSubstr("TLS is not built in"));
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
  for (const Row& row : {Row{reply(401, "no key"), "got status 401: no key"},
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

TEST(MtBench, FindsRatings) {
  struct Row {
    const char* text;
    double rating;
  };
  for (const Row& row :
       {Row{"Good. Rating: [[8]]", 8}, Row{"[[7.5]]", 7.5}, Row{"Rating: [6]", 6},
        Row{"[1] says so. Rating: [[9]]", 9}, Row{"[[10]]", 10}, Row{"[[11]]", 0}, Row{"[[0]]", 0},
        Row{"[[rating]] [[3]]", 3}, Row{"8", 0}, Row{"[[", 0}, Row{"[[5", 0}, Row{"", 0}}) {
    EXPECT_EQ(rating_of(row.text), row.rating) << row.text;
  }
  EXPECT_EQ(without_thoughts("<think>hm [[1]]</think>\n Yes. "), "Yes.");
  EXPECT_EQ(without_thoughts("Yes"), "Yes");
}

void write_bench(const TestFolder& folder) {
  write_file_atomically(
      folder.at("question.jsonl"),
      R"({"question_id": 1, "category": "writing", "turns": ["Write {answer}.", "Again."]})"
      "\n"
      R"({"question_id": 2, "category": "math", "turns": ["1+1?", "Twice?"]})"
      "\n");
  std::string prompts;
  for (const char* name : {"single-v1", "single-math-v1"}) {
    for (const char* turns : {"", "-multi-turn"}) {
      const std::string reference = std::string(name) == "single-v1" ? "" : " ref {ref_answer_1}";
      prompts += nlohmann::json({{"name", std::string(name) + turns},
                                 {"system_prompt", *turns == 0 ? "" : "Judge."},
                                 {"prompt_template",
                                  *turns == 0 ? "{question} -> {answer}" + reference
                                              : "{question_1} {answer_1} {question_2} {answer_2}" +
                                                    reference}})
                     .dump() +
                 "\n";
    }
  }
  write_file_atomically(folder.at("judge_prompts.jsonl"), prompts);
  write_file_atomically(folder.at("reference_gpt4.jsonl"),
                        R"({"question_id": 2, "choices": [{"turns": ["two", "four"]}]})"
                        "\n");
}

TEST(MtBench, AsksTwoTurnsAndJudgesEach) {
  const TestFolder folder;
  write_bench(folder);
  const MtBench bench = load_mt_bench(folder.at(""), 0);
  std::vector<std::string> judged;
  const Asker model = [&](const std::vector<MtConversation>& all) {
    EXPECT_EQ(all[0].temperature, 0.7);
    EXPECT_EQ(all[1].temperature, 0.0);
    std::vector<std::string> out;
    for (const MtConversation& one : all) {
      out.push_back("<think>x</think>answer " + std::to_string(one.messages.size()));
    }
    return out;
  };
  const Asker judge = [&](const std::vector<MtConversation>& all) {
    for (const MtConversation& one : all) {
      judged.push_back(one.messages.back().content);
    }
    return std::vector<std::string>{"[[8]]", "[[6]]", "[[3]]", "no rating"};
  };
  const MtResult result = run_mt_bench(bench, model, judge);
  EXPECT_THAT(judged,
              ElementsAre("Write {answer}. -> answer 1", "Write {answer}. answer 1 Again. answer 3",
                          "1+1? -> answer 1 ref two", "1+1? answer 1 Twice? answer 3 ref two"));
  EXPECT_EQ(result.unrated, 1);
  EXPECT_DOUBLE_EQ(result.score.value, 17.0 / 3);
  EXPECT_EQ(result.turns[0], 5.5);
  EXPECT_EQ(result.turns[1], 6.0);
  EXPECT_EQ(result.categories.at("writing"), 7.0);
  EXPECT_EQ(result.categories.at("math"), 3.0);
  EXPECT_EQ(load_mt_bench(folder.at(""), 1).questions.size(), 1U);
}

TEST(MtBench, BadFilesAreNamed) {
  const TestFolder folder;
  struct Row {
    const char* file;
    const char* text;
    const char* message;
  };
  for (const Row& row :
       {Row{"question.jsonl", "", "question.jsonl has no questions"},
        Row{"question.jsonl", R"({"question_id": 1, "category": "a", "turns": ["x"]})",
            "question.jsonl:1: expected 'turns', a list of two texts"},
        Row{"question.jsonl", R"({"category": "a", "turns": ["x", "y"]})",
            "question.jsonl:1: expected a number in field 'question_id'"},
        Row{"question.jsonl", "[]", "question.jsonl:1: expected"},
        Row{"judge_prompts.jsonl", "{}", "judge_prompts.jsonl:1: expected text in field 'name'"},
        Row{"judge_prompts.jsonl",
            R"({"name": "single-v1", "system_prompt": "", "prompt_template": ""})",
            "expected a prompt 'single-v1-multi-turn'"},
        Row{"reference_gpt4.jsonl", R"({"question_id": 2, "choices": []})",
            "reference_gpt4.jsonl:1: expected 'choices'"}}) {
    write_bench(folder);
    write_file_atomically(folder.at(row.file), row.text);
    EXPECT_THAT(message_of([&] { load_mt_bench(folder.at(""), 0); }), HasSubstr(row.message));
  }
}

}  // namespace
}  // namespace cambium
