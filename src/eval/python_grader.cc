// Grading of programs: the response's code and the task's tests, run in the sandbox.
#include <algorithm>
#include <array>
#include <span>
#include <vector>

#include "base/checksum.h"
#include "base/text.h"
#include "eval/graders.h"
#include "eval/sandbox.h"

namespace cambium {
namespace {

bool starts_code(std::string_view line) {
  static constexpr std::array<std::string_view, 6> kWords = {"def ",  "class ", "import ",
                                                             "from ", "@",      "async def "};
  return std::any_of(kWords.begin(), kWords.end(),
                     [&](std::string_view word) { return line.starts_with(word); });
}

std::vector<std::string_view> lines_of(std::string_view text) {
  std::vector<std::string_view> lines;
  while (!text.empty()) {
    const size_t end = std::min(text.find('\n'), text.size());
    lines.push_back(text.substr(0, end));
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return lines;
}

/// Whether a line opens or closes a fenced block, and the block's language.
bool is_fence(std::string_view line, std::string* language) {
  const size_t begin = line.find_first_not_of(" \t");
  if (begin == std::string_view::npos || !line.substr(begin).starts_with("```")) {
    return false;
  }
  line.remove_prefix(begin + 3);
  const size_t end = line.find_first_of(" \t\r");
  *language = std::string(line.substr(0, std::min(end, line.size())));
  return true;
}

/// The last line that is not blank: of a failed Python program, its error.
std::string last_line(std::string_view output) {
  const auto lines = lines_of(output);
  const auto it = std::find_if(lines.rbegin(), lines.rend(), [](std::string_view line) {
    return line.find_first_not_of(" \t\r") != std::string_view::npos;
  });
  return it == lines.rend() ? "" : std::string(it->substr(0, 200));
}

}  // namespace

std::optional<std::string> python_code(std::string_view response) {
  std::vector<std::string> blocks;
  bool inside = false;
  bool ours = false;
  std::string language;
  std::string loose;  // without fences
  bool in_code = false;
  for (const std::string_view line : lines_of(response)) {
    if (is_fence(line, &language)) {
      inside = !inside;
      ours = inside && (language.empty() || language == "python" || language == "python3" ||
                        language == "py" || language == "Python");
      if (ours) {
        blocks.emplace_back();
      }
      continue;
    }
    if (inside && ours) {
      blocks.back() += std::string(line) + "\n";
    }
    in_code = in_code || starts_code(line);
    if (in_code && !inside) {
      loose += std::string(line) + "\n";
    }
  }
  const auto defines = [](const std::string& block) {
    const auto lines = lines_of(block);
    return std::any_of(lines.begin(), lines.end(), [](std::string_view line) {
      return line.starts_with("def ") || line.starts_with("class ") ||
             line.starts_with("async def ") || line.find("lambda") != std::string_view::npos;
    });
  };
  if (const auto it = std::find_if(blocks.begin(), blocks.end(), defines); it != blocks.end()) {
    return *it;
  }
  if (!blocks.empty()) {
    return blocks.front();
  }
  return loose.empty() ? std::nullopt : std::optional(loose);
}

Grade grade_python(std::string_view response, std::string_view tests) {
  Grade out;
  const std::optional<std::string> code = python_code(response);
  if (!code) {
    out.given = "no code";
    return out;
  }
  out.answered = true;
  // Printed after the last test; an early exit of the program's own does not print it. The tests
  // are read before the answer runs, which may write to their file; an answer that looks for the
  // grader in its own process can fool it, and is not what is guarded against.
  const std::string program = *code + std::string(tests);
  const std::string passed = "passed " + checksum_text(checksum(std::as_bytes(std::span(program))));
  const std::string main =
      "import sys\nout, run = sys.stdout, exec\n"
      "names = {'__name__': 'solution'}\n"
      "def read(file):\n"
      "    with open(file) as f:\n"
      "        return f.read()\n"
      "texts = [(file, read(file)) for file in ('solution.py', 'tests.py')]\n"
      "for file, text in texts:\n"
      "    run(compile(text, file, 'exec'), names)\n"
      "print('\\n" +
      passed + "', file=out, flush=True)\n";
  const SandboxLimits limits;
  const SandboxResult run = run_sandboxed(
      {"python3", "-I", "main.py"},
      {{"main.py", main}, {"solution.py", *code}, {"tests.py", std::string(tests)}}, limits);
  out.correct =
      run.outcome == SandboxOutcome::kExited && run.status == 0 && last_line(run.output) == passed;
  if (out.correct) {
    out.given = "passed";
  } else {
    const std::string why = last_line(run.output);
    out.given = describe(run, limits) + (why.empty() ? "" : ": " + why);
  }
  return out;
}

}  // namespace cambium
