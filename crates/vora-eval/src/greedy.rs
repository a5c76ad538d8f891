//! What a model says by itself.

use anyhow::Result;
use vora_infer::{FinishReason, SamplingParams, generate_batch};
use vora_model::{Input, VisionLanguageModel};
use vora_text::Tokenizer;

/// What the model says after each prompt of `input`, always the likeliest token; none where it has not come to an end
/// within `max_new_tokens`.
///
/// For a model in training: an engine takes a model for itself and packs its weights and adapters as they are, while here they
/// change with each step and stay with whoever trains them.
///
/// # Errors
/// Where a prompt does not fit the model, or a token is none of the tokenizer's.
pub fn greedy_answers(
    model: &dyn VisionLanguageModel,
    tokenizer: &Tokenizer,
    input: &Input,
    max_new_tokens: usize,
) -> Result<Vec<Option<String>>> {
    let greedy = SamplingParams::default();
    let generated = generate_batch(model, input, &greedy, tokenizer.eos_ids(), max_new_tokens)?;
    let ended = |finish_reason| finish_reason == FinishReason::Stop;
    generated.iter().map(|row| ended(row.finish_reason).then(|| tokenizer.decode(&row.ids, true)).transpose()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind, Tensor};
    use vora_infer::generate;
    use vora_llm::LlmConfig;
    use vora_model::{Vora, VoraConfig};
    use vora_text::{Span, Spans};
    use vora_torch::weights::Weights;

    /// A picture, and a word.
    fn prompt(word: i64) -> Input {
        Input::new(
            Tensor::from_slice(&[0, 0, 0, 0, word]).unsqueeze(0),
            vec![fixtures::Random::new(1).normal([3, 8, 8])],
            Spans::new(vec![vec![Span::image(2, 2), Span::text(1)]]),
        )
    }

    #[test]
    fn only_an_answer_that_ends_is_one() {
        let llm = LlmConfig { tie_word_embeddings: false, ..LlmConfig::tiny(200) };
        let config = VoraConfig::new(llm, 12, 4, 8);
        let model = Vora::load(config, &Weights::random(9, Device::Cpu, Kind::Float)).unwrap();
        let free = |word| generate(&model, &prompt(word), &SamplingParams::default(), &[], 6, |_| true).unwrap().ids;
        let (ends, goes_on) = (free(5), free(6));
        assert!(!goes_on.contains(&ends[3]) && !ends[..3].contains(&ends[3]), "{ends:?} {goes_on:?}");
        let folder = tempfile::tempdir().unwrap();
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            std::fs::copy(fixtures::root().join("tiny/tokenizer").join(file), folder.path().join(file)).unwrap();
        }
        let stop = serde_json::json!({"eos_token_id": ends[3]}).to_string();
        std::fs::write(folder.path().join("generation_config.json"), stop).unwrap();
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        let input = Input::concat(vec![prompt(5), prompt(6)]).unwrap();
        let answers = greedy_answers(&model, &tokenizer, &input, 6).unwrap();
        assert_eq!(answers, [Some(tokenizer.decode(&ends[..3], true).unwrap()), None]);
    }
}
