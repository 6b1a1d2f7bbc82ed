#include "hybrid/sealed.h"

#include "base/checksum.h"
#include "base/error.h"
#include "base/file.h"

namespace cambium {
namespace {

constexpr std::string_view kOpen = "{\n";
constexpr std::string_view kKey = "{\n \"checksum\": \"";
constexpr std::string_view kEnd = "\",\n";
constexpr size_t kDigits = 16;
constexpr size_t kHead = kKey.size() + kDigits + kEnd.size();

}  // namespace

std::string seal(std::string_view json) {
  CAMBIUM_CHECK(json.starts_with(kOpen) && json.size() > 4);
  const std::string digest = checksum_text(checksum(std::as_bytes(std::span(json))));
  return fmt::format("{}{}{}{}", kKey, digest, kEnd, json.substr(kOpen.size()));
}

bool is_sealed(std::string_view text) {
  return text.size() > kHead && text.starts_with(kKey) &&
         text.substr(kKey.size() + kDigits, kEnd.size()) == kEnd;
}

std::string unseal(std::string_view text, const std::string& where) {
  expect(is_sealed(text),
         "{} has no checksum; it was written by an earlier version or by hand, and nobody can tell "
         "whether it is whole",
         where);
  std::string json = fmt::format("{}{}", kOpen, text.substr(kHead));
  const std::string digest = checksum_text(checksum(std::as_bytes(std::span(json))));
  expect(digest == text.substr(kKey.size(), kDigits),
         "{} is not what was written: its checksum is {}, not {}; it was damaged or edited", where,
         digest, text.substr(kKey.size(), kDigits));
  return json;
}

void write_sealed(const std::filesystem::path& path, std::string_view json) {
  write_file_atomically(path.string(), seal(json));
}

std::string read_sealed(const std::filesystem::path& path) {
  return unseal(read_text_file(path.string()), path.string());
}

}  // namespace cambium
