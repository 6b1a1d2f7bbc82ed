// The sections of cuda_bench that stand in files of their own.
#pragma once

namespace cambium {

class Bench;

void attention_section(Bench& bench);  // cuda_attention.cc
void narrow_section(Bench& bench);
void recurrence_section(Bench& bench);  // cuda_mixers.cc
void scan_section(Bench& bench);
void pointwise_section(Bench& bench);  // cuda_elements.cc
void loss_section(Bench& bench);
void latent_section(Bench& bench);  // cuda_latent.cc
void experts_section(Bench& bench);
void chosen_section(Bench& bench);  // cuda_chosen.cc

}  // namespace cambium
