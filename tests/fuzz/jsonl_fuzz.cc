#include "fuzz/fuzzing.h"
#include "text/tokenizer_train.h"
#include "train/dataset.h"

using namespace cambium;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const Tokenizer tokenizer = [] {
    const TokenizerFiles files =
        train_tokenizer({}, 257, {"<|end|>"},
                        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>\n{% endfor %}"
                        "{% if add_generation_prompt %}<assistant>{% endif %}");
    return Tokenizer::parse(files.tokenizer_json, files.config_json);
  }();
  const fuzz::InputFile file(fuzz::text_of(data, size));
  return fuzz::allow_errors([&] { load_jsonl(file.path(), tokenizer); });
}
