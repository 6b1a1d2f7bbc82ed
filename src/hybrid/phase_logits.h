// The stored logits that a phase of a plan is trained by.
#pragma once

#include <filesystem>
#include <memory>

#include "hybrid/plan.h"
#include "train/stored_logits.h"

namespace cambium {

/// Those in the phase's file, which is made where it is not there, from where a run before was
/// stopped. Error where it is of other data, another tokenizer or teacher, keeps another number of
/// tokens or shorter documents, or is damaged.
std::unique_ptr<StoredLogits> phase_logits(const Phase& phase, Model& teacher,
                                           const std::filesystem::path& teacher_dir,
                                           const DocumentSource& data, const Tokenizer& tokenizer);

}  // namespace cambium
