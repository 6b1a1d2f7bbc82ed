#include "eval/report/png.h"

#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <string>

#include "base/error.h"
#include "base/file.h"

namespace cambium {

void write_png(const std::filesystem::path& svg, const std::filesystem::path& png) {
  AtomicDirectory work(png.string() + ".parts");
  const std::string drawn = work.path() + "/drawn.png";
  std::string words[] = {"rsvg-convert", "--zoom=2", "--format=png", "--output=" + drawn,
                         std::filesystem::absolute(svg).string()};
  char* argv[] = {words[0].data(), words[1].data(), words[2].data(),
                  words[3].data(), words[4].data(), nullptr};
  pid_t child = 0;
  const int error = posix_spawnp(&child, argv[0], nullptr, nullptr, argv, environ);
  expect(
      error != ENOENT,
      "{}: PNG is drawn by rsvg-convert, which is not here: install librsvg2-bin (Debian, Ubuntu) "
      "or librsvg (elsewhere); {} shows the same",
      png.string(), svg.string());
  expect(error == 0, "rsvg-convert does not start: {}", std::generic_category().message(error));
  int status = 0;
  while (waitpid(child, &status, 0) < 0) {
    expect(errno == EINTR, "waiting for rsvg-convert: {}", std::generic_category().message(errno));
  }
  expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "{}: rsvg-convert could not draw {} ({})",
         png.string(), svg.string(),
         WIFEXITED(status) ? fmt::format("exit status {}", WEXITSTATUS(status))
                           : fmt::format("signal {}", WTERMSIG(status)));
  write_file_atomically(png.string(), read_text_file(drawn));
}

}  // namespace cambium
