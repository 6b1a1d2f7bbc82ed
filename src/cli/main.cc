#include "cli/commands.h"

int main(int argc, char** argv) {
  using namespace cambium;
  return run_command_line(
      argc, argv,
      {hybridize_command(), score_command(), place_command(), convert_command(), merge_command(),
       distill_command(), logits_command(), train_command(), data_command(), eval_command(),
       bench_command(), report_command(), inspect_command(), verify_command(), import_command(),
       export_command(), generate_command(), chat_command()});
}
