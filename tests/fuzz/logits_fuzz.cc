// Stored logits. The file ends in a checksum of all before it, which no input would meet: it is
// added here, so that what stands behind it is reached.
#include <algorithm>

#include "base/checksum.h"
#include "fuzz/fuzzing.h"
#include "train/stored_logits.h"

using namespace cambium;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const fuzz::InputFile raw(fuzz::text_of(data, size));
  fuzz::allow_errors([&] { const StoredLogits logits(raw.path()); });
  std::string sealed(fuzz::text_of(data, size));
  const uint64_t sum = checksum(std::as_bytes(std::span(sealed)));
  sealed.append(reinterpret_cast<const char*>(&sum), sizeof sum);
  const fuzz::InputFile file(sealed);
  return fuzz::allow_errors([&] {
    const StoredLogits logits(file.path());
    const StoredLogitsInfo& info = logits.info();
    for (int64_t document = 0; document < std::min<int64_t>(info.documents + 1, 4); ++document) {
      fuzz::allow_errors([&] {
        PackedSequence sequence;
        add_document(sequence, {{1, 2, 3, 4}, {0, 1, 1, 1}});
        sequence.documents = {static_cast<uint64_t>(document)};
        const StoredRows rows = logits.rows_of(sequence);
        for (const int32_t token : rows.tokens) {
          if (token < 0 || token >= info.vocabulary) {
            std::abort();
          }
        }
      });
    }
  });
}
