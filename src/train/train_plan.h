// A stage of training as a plan says it. `cambium train`, `cambium distill` and the staged plans of
// the graft read the same keys here; docs/distillation.md has the table of them.
#pragma once

#include "base/fields.h"
#include "base/toml.h"
#include "train/trainer.h"

namespace cambium {

/// The keys of a stage: what they are called, mean and may be.
void visit_fields(TrainConfig& config, FieldVisitor& visit);
/// The keys of its [optimizer] alone.
void visit_fields(OptimizerConfig& optimizer, FieldVisitor& visit);

/// Reads a stage. What a key is not given for is as in `defaults`; steps given in `plan` replace
/// the tokens of `defaults`, and the other way round. Folder, label and resume are the caller's.
/// With `partial`, steps and tokens may stay 0: the keys are defaults of stages that give their
/// own.
TrainConfig read_train_config(const PlanTable& plan, const TrainConfig& defaults = {},
                              bool partial = false);

}  // namespace cambium
