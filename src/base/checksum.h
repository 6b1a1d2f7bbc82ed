// XXH3 (64 bit) checksums: they find damaged files, they do not stop a forger.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

struct XXH3_state_s;

namespace cambium {

/// Checksum of bytes that come in pieces; the pieces' borders do not matter.
class Checksum {
 public:
  Checksum();
  void update(std::span<const std::byte> bytes);
  /// Of everything so far; more may follow.
  uint64_t digest() const;

 private:
  struct Free {
    void operator()(XXH3_state_s* state) const;
  };
  std::unique_ptr<XXH3_state_s, Free> state_;
};

uint64_t checksum(std::span<const std::byte> bytes);

/// 16 hexadecimal digits.
std::string checksum_text(uint64_t digest);

}  // namespace cambium
