#include "ops/matmul/matmul_choices.h"

#include <gtest/gtest.h>

#include <cstdlib>

#include "base/test_folder.h"

namespace cambium {
namespace {

const ProductChoices::Choice kOne{1, 2, 3, 4, 5, 6, 7, 0xfedcba9876543210};

TEST(ProductChoices, AreThereTheNextTime) {
  const TestFolder folder;
  const auto file = folder.at("deeper/products.txt");
  {
    ProductChoices choices(file);
    EXPECT_FALSE(choices.find("a b"));
    choices.add("a b", kOne);
    choices.add("c", {});
    EXPECT_EQ(choices.find("a b"), kOne);
  }
  ProductChoices again(file);
  EXPECT_EQ(again.find("a b"), kOne);
  EXPECT_EQ(again.find("c"), ProductChoices::Choice{});
  again.add("c", kOne);
  EXPECT_EQ(ProductChoices(file).find("c"), kOne) << "the last line holds";
}

TEST(ProductChoices, LinesThatAreNoneAreNotTaken) {
  const TestFolder folder;
  const auto file = folder.at("products.txt");
  const std::string words(128, '1');
  write_file_atomically(
      file, "no tab\nshort\t12\nword\t" + std::string(128, 'g') + "\ngood\t" + words + "\n");
  const ProductChoices choices(file);
  EXPECT_FALSE(choices.find("short"));
  EXPECT_FALSE(choices.find("word"));
  EXPECT_TRUE(choices.find("good"));
}

TEST(ProductChoices, WithoutAFileAreOfTheProgram) {
  ProductChoices choices({});
  choices.add("a", kOne);
  EXPECT_EQ(choices.find("a"), kOne);
  ProductChoices unwritable("/proc/no/such/folder/products.txt");
  unwritable.add("a", kOne);
  EXPECT_EQ(unwritable.find("a"), kOne);
}

}  // namespace
}  // namespace cambium
