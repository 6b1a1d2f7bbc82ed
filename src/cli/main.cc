#include "cli/commands.h"

int main(int argc, char** argv) {
  using namespace cambium;
  return run_command_line(argc, argv, {train_command(), data_command()});
}
