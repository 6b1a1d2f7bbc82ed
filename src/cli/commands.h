// The commands, one file each. To add one: write cmd_NAME.cc with a function that returns a
// Command, declare it here and add it to the list in main.cc.
#pragma once

#include "cli/args.h"

namespace cambium {

Command hybridize_command();
Command score_command();
Command place_command();
Command convert_command();
Command merge_command();
Command distill_command();
Command logits_command();
Command train_command();
Command data_command();
Command eval_command();
Command bench_command();
Command bench_train_command();  // a kind of bench
Command bench_ops_command();
Command report_command();
Command inspect_command();
Command verify_command();
Command import_command();
Command export_command();
Command generate_command();
Command chat_command();

}  // namespace cambium
