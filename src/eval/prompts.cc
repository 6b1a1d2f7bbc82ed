#include "eval/prompts.h"

#include "base/error.h"
#include "text/prompt_format.h"

namespace cambium {
namespace {

std::string harness_question(const Task& task, const Example& example) {
  if (!example.harness.empty()) {
    return example.harness;
  }
  if (task.form == AnswerForm::kMath) {
    return "Problem:\n" + example.question + "\n\nSolution:";
  }
  if (task.form == AnswerForm::kLetter) {
    return choice_prompt(example.choice, task.style).context;
  }
  return "Question: " + example.question + "\nAnswer:";
}

/// How a worked example ends; the space before it is part of it.
std::string harness_answer(const Task& task, const Example& example) {
  if (task.form == AnswerForm::kPython) {
    return example.solution + "\n[DONE]";
  }
  if (task.form == AnswerForm::kMath) {
    return " " + example.solution + "\nFinal Answer: The final answer is $" + example.answer +
           "$. I hope it is correct.";
  }
  if (task.form == AnswerForm::kLetter) {
    return choice_prompt(example.choice, task.style)
        .continuations[static_cast<size_t>(example.choice.correct)];
  }
  return " " + (example.solution.empty() ? example.answer : example.solution);
}

std::string chat_answer(const Task& task, const Example& example) {
  if (task.form == AnswerForm::kPython) {
    return "```python\n" + example.solution + "\n```";
  }
  if (task.form == AnswerForm::kLetter) {
    return "Answer: " + example.answer;
  }
  return example.solution.empty() ? example.answer : example.solution;
}

}  // namespace

void expect_promptable(const Task& task, const PromptConfig& config) {
  expect(config.shots.empty() || config.chat || config.words == PromptWords::kHarness,
         "{}: worked examples without a chat template need words that tell questions and answers "
         "apart: add --words harness, or --chat",
         task.name);
  expect(config.words == PromptWords::kPlain || !config.chat,
         "{}: --words harness is a prompt of its own; leave --chat away", task.name);
}

std::string prompt_text(const Tokenizer& tokenizer, const Task& task, const Example& example,
                        const PromptConfig& config) {
  if (config.chat) {
    std::vector<ChatMessage> messages;
    for (const Example& shot : config.shots) {
      messages.push_back({"user", shot.question});
      messages.push_back({"assistant", chat_answer(task, shot)});
    }
    messages.push_back({"user", example.question});
    return tokenizer.apply_chat_template(messages);
  }
  if (config.words == PromptWords::kPlain) {
    return question_prompt(example.question);
  }
  std::string text;
  for (const Example& shot : config.shots) {
    text += harness_question(task, shot) + harness_answer(task, shot) + "\n\n";
  }
  return text + harness_question(task, example);
}

std::vector<int32_t> prompt_tokens(const Tokenizer& tokenizer, const std::string& text,
                                   const PromptConfig& config) {
  return tokenizer.encode(text, !config.chat);
}

std::vector<std::string> stop_texts(const Task& task, const PromptConfig& config) {
  if (config.words == PromptWords::kPlain) {
    return {};
  }
  switch (task.form) {
    case AnswerForm::kPython:
      return {"[DONE]"};
    case AnswerForm::kMath:
      return {"Problem:"};
    default:
      return {"Question:"};
  }
}

}  // namespace cambium
