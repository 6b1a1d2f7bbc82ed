// A TOML plan, read as `cambium train` reads [train].
#include "base/toml.h"
#include "fuzz/fuzzing.h"
#include "train/train_plan.h"

using namespace cambium;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return fuzz::allow_errors([&] {
    const PlanTable plan = PlanTable::parse(fuzz::text_of(data, size));
    read_train_config(plan.table("train"));
    plan.expect_all_used();
  });
}
