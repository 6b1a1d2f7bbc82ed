// What a model is asked: the question in the words of training or of a reference harness, worked
// examples before it, and what ends its answer.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "eval/tasks.h"
#include "text/tokenizer.h"

namespace cambium {

enum class PromptWords : uint8_t {
  kPlain,    // "question\n", as models are trained here (text/prompt_format.h)
  kHarness,  // lm-evaluation-harness: "Question: ...\nAnswer:" (gsm8k),
             // "Problem:\n...\n\nSolution:" (minerva_math), "You are an expert Python programmer,
             // ... [BEGIN]\n" (mbpp)
};

struct PromptConfig {
  /// Through the tokenizer's chat template; worked examples are turns before the question.
  bool chat = false;
  PromptWords words = PromptWords::kPlain;
  /// Examples with solutions; without a chat template they need the harness's words.
  std::vector<Example> shots{};
};

/// Error, before anything is asked, where the shots do not go with the task and the words.
void expect_promptable(const Task& task, const PromptConfig& config);

/// The prompt as text, and as tokens: prompts in the harness's words and templates are encoded
/// whole.
std::string prompt_text(const Tokenizer& tokenizer, const Task& task, const Example& example,
                        const PromptConfig& config);
std::vector<int32_t> prompt_tokens(const Tokenizer& tokenizer, const std::string& text,
                                   const PromptConfig& config);

/// Texts that end an answer, themselves no part of it.
std::vector<std::string> stop_texts(const Task& task, const PromptConfig& config);

}  // namespace cambium
