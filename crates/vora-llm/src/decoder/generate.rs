//! Going on with texts, one token at a time.

use anyhow::{Result, ensure};
use tch::Tensor;
use vora_text::Spans;

use super::causal_lm::CausalLm;
use crate::attention::{AttentionPlan, VisionAttention};

/// When a text ends, and who writes it. Keys as HF's `GenerationConfig` spells them.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct GenerationConfig {
    /// Tokens of a text at most, its prompt's included.
    pub max_length: usize,
    /// Tokens that end a text; they are part of it.
    pub eos_token_id: Vec<i64>,
    /// Whether adapters act, on every token, or the weights alone write.
    pub adapters: bool,
}

impl GenerationConfig {
    /// Texts of up to so many tokens, which nothing else ends.
    pub fn new(max_length: usize) -> Self {
        Self { max_length, eos_token_id: Vec::new(), adapters: true }
    }

    /// Texts that these tokens end.
    #[must_use]
    pub fn with_eos_token_id(self, eos_token_id: &[i64]) -> Self {
        Self { eos_token_id: eos_token_id.to_vec(), ..self }
    }

    /// Texts of the weights alone.
    #[must_use]
    pub fn without_adapters(self) -> Self {
        Self { adapters: false, ..self }
    }
}

/// The likeliest token of each row: `[rows, vocab]` -> one a row.
///
/// # Errors
/// Where the logits are no such matrix.
pub fn greedy(logits: &Tensor) -> Result<Vec<i64>> {
    Ok(logits.argmax(1, false).try_into()?)
}

impl CausalLm {
    /// Goes on with each prompt; all go through the layers side by side. `choose` makes of logits `[rows, vocab]` one token a row,
    /// as [`greedy`] does. Each text comes back with its prompt before it.
    ///
    /// # Errors
    /// Where a prompt is empty or leaves no room, and what `choose` returns.
    pub fn generate(
        &self,
        prompts: &[impl AsRef<[i64]>],
        config: &GenerationConfig,
        mut choose: impl FnMut(&Tensor) -> Result<Vec<i64>>,
    ) -> Result<Vec<Vec<i64>>> {
        let mut texts: Vec<Vec<i64>> = prompts.iter().map(|prompt| prompt.as_ref().to_vec()).collect();
        if texts.is_empty() {
            return Ok(texts);
        }
        for (row, text) in texts.iter().enumerate() {
            let room = 1..config.max_length;
            ensure!(
                room.contains(&text.len()),
                "prompt {row} has {} tokens, it takes one at least and fewer than max_length, {}",
                text.len(),
                config.max_length
            );
        }
        let (padded, spans) = Spans::padded(&texts);
        let plan = AttentionPlan::new(&spans, VisionAttention::Causal, self.device(), self.kind())?;
        let plan = if config.adapters { plan } else { plan.without_adapters() };
        let input_ids = Tensor::from_slice(&padded).view([-1, spans.seq()]).to_device(self.device());
        // The longest prompt's row goes on while the shortest one's text is not done.
        let mut cache = self.new_cache(spans.batch(), config.max_length as i64 + spans.seq())?;
        let mut logits = self.prefill(&self.embed(&input_ids), &plan, &mut cache)?; // [rows, vocab]
        let mut is_open = vec![true; texts.len()];
        loop {
            let chosen = choose(&logits)?;
            ensure!(chosen.len() == texts.len(), "{} tokens were chosen for {} rows", chosen.len(), texts.len());
            for ((text, is_open), token) in texts.iter_mut().zip(&mut is_open).zip(&chosen) {
                if *is_open {
                    text.push(*token);
                    *is_open = text.len() < config.max_length && !config.eos_token_id.contains(token);
                }
            }
            if !is_open.contains(&true) {
                return Ok(texts);
            }
            // A row that has ended goes on with whatever was chosen, of which nothing is kept.
            logits =
                self.decode_step(&Tensor::from_slice(&chosen).unsqueeze(1).to_device(self.device()), &mut cache)?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};
    use vora_lora::{LoraConfig, attach_all};
    use vora_torch::weights::Weights;

    use crate::LlmConfig;

    /// What all tokens so far make the likeliest, without a cache.
    fn by_definition(llm: &CausalLm, prompt: &[i64], length: usize) -> Vec<i64> {
        let mut ids = prompt.to_vec();
        while ids.len() < length {
            let spans = Spans::text(&[ids.len() as i64]);
            let plan = AttentionPlan::new(&spans, VisionAttention::Causal, Device::Cpu, Kind::Float).unwrap();
            let embeds = llm.embed(&Tensor::from_slice(&ids).unsqueeze(0));
            let last = tch::no_grad(|| llm.decoder().forward(&embeds, &plan, 0).last_hidden_state.select(1, -1));
            ids.extend(greedy(&llm.logits(&last)).unwrap());
        }
        ids
    }

    #[test]
    fn texts_are_what_whole_passes_make_the_likeliest() {
        let weights = Weights::random(2, Device::Cpu, Kind::Float).with_initializer_range(0.3);
        let mut llm = CausalLm::load(&LlmConfig::tiny(64), &weights).unwrap();
        let prompts = [vec![5, 6, 7], vec![9]];
        let config = GenerationConfig::new(12);
        let plain = llm.generate(&prompts, &config, greedy).unwrap();
        for (text, prompt) in plain.iter().zip(&prompts) {
            assert_eq!(*text, by_definition(&llm, prompt, 12));
        }
        // A token that ends a text is its last one; the other goes on.
        let end = plain[1][6];
        let first = plain[1][1..].iter().position(|token| *token == end).unwrap() + 1;
        let ended = llm.generate(&prompts, &config.clone().with_eos_token_id(&[end]), greedy).unwrap();
        assert_eq!(ended[1], plain[1][..=first]);

        let adapters = Weights::random(3, Device::Cpu, Kind::Float);
        attach_all("a", &LoraConfig::new(2, 2), &adapters, |visit| llm.linears_mut(visit)).unwrap();
        for (name, tensor) in adapters.parameters() {
            if name.contains("lora_B") {
                let values = fixtures::Random::new(3).normal(tensor.size());
                tch::no_grad(|| tensor.shallow_clone().copy_(&values));
            }
        }
        assert_eq!(llm.generate(&prompts, &config.clone().without_adapters(), greedy).unwrap(), plain);
        assert_ne!(llm.generate(&prompts, &config, greedy).unwrap(), plain);

        for (prompt, says) in [(vec![], "prompt 0 has 0 tokens"), (vec![1; 12], "prompt 0 has 12 tokens")] {
            let error = llm.generate(&[prompt], &config, greedy).unwrap_err().to_string();
            assert!(error.starts_with(says), "{error}");
        }
        assert!(llm.generate(&[[0i64; 0]; 0], &config, greedy).unwrap().is_empty());
    }
}
