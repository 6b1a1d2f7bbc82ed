#include "base/test_folder.h"

#include <cstdlib>
#include <filesystem>

#include "base/error.h"

namespace cambium {

TestFolder::TestFolder() {
  path_ = (std::filesystem::temp_directory_path() / "cambium-test-XXXXXX").string();
  expect(::mkdtemp(path_.data()) != nullptr, "cannot create the folder {}", path_);
}

TestFolder::~TestFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

}  // namespace cambium
