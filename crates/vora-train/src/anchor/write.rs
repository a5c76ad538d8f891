//! Texts that an LLM writes itself: sampled from the frozen weights, with a seed.

use anyhow::{Context, Result};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Kind, Tensor};
use vora_data::Preparation;
use vora_llm::{AttentionPlan, CausalLm, VisionAttention};
use vora_recipe::TextAnchor;
use vora_text::{Message, Piece, Spans};

use super::prompts::{QUESTIONS, STARTS};

/// Texts that are written side by side.
const ROWS: usize = 48;

/// Writes as many texts as the configuration asks for, with the adapters off. Every other one answers a question, in
/// the run's own chat template.
///
/// # Errors
/// Where the chat template does not take a question, or the LLM's context is shorter than a beginning.
pub(super) fn write(
    llm: &CausalLm,
    preparation: &Preparation,
    config: &TextAnchor,
    seed: u64,
) -> Result<Vec<Vec<i64>>> {
    let prompts = (0..config.texts).map(|i| prompt(preparation, i, config.max_length)).collect::<Result<Vec<_>>>()?;
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut texts = Vec::with_capacity(prompts.len());
    for prompts in prompts.chunks(ROWS) {
        texts.extend(go_on(llm, prompts, preparation.tokenizer.eos_ids(), config, &mut random)?);
    }
    Ok(texts)
}

/// What the text of this number begins with.
fn prompt(preparation: &Preparation, number: usize, max_length: usize) -> Result<Vec<i64>> {
    let tokenizer = &preparation.tokenizer;
    let mut ids = if number.is_multiple_of(2) {
        tokenizer.encode(STARTS[number / 2 % STARTS.len()])?
    } else {
        let message = Message::new("user", QUESTIONS[number / 2 % QUESTIONS.len()]);
        let pieces = preparation.chat.encode_prompt(tokenizer, &[message]).context("text_anchor")?;
        let ids = pieces.into_iter().filter_map(|piece| match piece {
            Piece::Text { ids, .. } => Some(ids),
            Piece::Image => None,
        });
        ids.flatten().collect()
    };
    ids.truncate(max_length - 1);
    Ok(ids)
}

/// Each prompt with what the LLM adds to it, up to `max_length` tokens or a token of `stop`, which is part of the text.
fn go_on(
    llm: &CausalLm,
    prompts: &[Vec<i64>],
    stop: &[i64],
    config: &TextAnchor,
    random: &mut ChaCha8Rng,
) -> Result<Vec<Vec<i64>>> {
    let (padded, spans) = Spans::padded(prompts);
    let plan = AttentionPlan::new(&spans, VisionAttention::Causal, llm.device(), llm.kind())?.without_adapters();
    let input_ids = Tensor::from_slice(&padded).view([-1, spans.seq()]).to_device(llm.device());
    // The longest prompt's row goes on while the shortest one's text is not done.
    let mut cache = llm.new_cache(spans.batch(), config.max_length as i64 + spans.seq())?;
    let mut logits = llm.prefill(&llm.embed(&input_ids), &plan, &mut cache)?; // [rows, vocab]
    let mut texts = prompts.to_vec();
    let mut is_open = vec![true; texts.len()];
    loop {
        let drawn = draw(&logits, config.temperature, random)?;
        for ((text, is_open), token) in texts.iter_mut().zip(&mut is_open).zip(&drawn) {
            if *is_open {
                text.push(*token);
                *is_open = text.len() < config.max_length && !stop.contains(token);
            }
        }
        if !is_open.contains(&true) {
            return Ok(texts);
        }
        // A row that has ended goes on with whatever was drawn, of which nothing is kept.
        logits = llm.decode_step(&Tensor::from_slice(&drawn).unsqueeze(1).to_device(llm.device()), &mut cache)?;
    }
}

/// One token for each row of `[rows, vocab]`, by its probability at this temperature.
fn draw(logits: &Tensor, temperature: f64, random: &mut ChaCha8Rng) -> Result<Vec<i64>> {
    let rows = logits.size()[0];
    let at: Vec<f64> = (0..rows).map(|_| random.random::<f64>()).collect();
    let at = Tensor::from_slice(&at).to_device(logits.device()).unsqueeze(1); // [rows, 1]
    let sums = (logits.to_kind(Kind::Float) / temperature).softmax(-1, Kind::Double).cumsum(-1, Kind::Double);
    let drawn = sums.le_tensor(&at).sum_dim_intlist(-1, false, Kind::Int64); // [rows]
    Ok(drawn.clamp_max(logits.size()[1] - 1).try_into()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;
    use vora_llm::LlmConfig;
    use vora_torch::weights::Weights;

    #[test]
    fn tokens_are_drawn_by_their_probabilities() {
        let probabilities = [0.1f64, 0.6, 0.0, 0.3];
        let logits = Tensor::from_slice(&probabilities).log().expand([4000, 4], false);
        let drawn = draw(&logits, 1.0, &mut ChaCha8Rng::seed_from_u64(5)).unwrap();
        for (token, p) in (0..).zip(probabilities) {
            let share = drawn.iter().filter(|drawn| **drawn == token).count() as f64 / 4000.0;
            assert!((share - p).abs() < 0.03, "{token}: {share} of {p}");
        }
        // At a low temperature the likeliest comes almost always.
        let cold = draw(&logits, 0.1, &mut ChaCha8Rng::seed_from_u64(5)).unwrap();
        assert!(cold.iter().filter(|token| **token == 1).count() > 3980);
    }

    #[test]
    fn a_text_goes_on_from_its_prompt_up_to_its_length_or_its_end() {
        let llm = CausalLm::load(&LlmConfig::tiny(64), &Weights::random(2, Device::Cpu, Kind::Float)).unwrap();
        let prompts = vec![vec![5, 6, 7], vec![9]];
        let config = TextAnchor { max_length: 12, ..TextAnchor::default() };
        let write =
            |seed, stop: &[i64]| go_on(&llm, &prompts, stop, &config, &mut ChaCha8Rng::seed_from_u64(seed)).unwrap();
        let texts = write(1, &[]);
        assert!(texts.iter().zip(&prompts).all(|(text, prompt)| text.len() == 12 && text.starts_with(prompt)));
        assert_eq!(write(1, &[]), texts);
        assert_ne!(write(2, &[]), texts);
        let end = texts[1][6];
        let first = texts[1][1..].iter().position(|token| *token == end).unwrap() + 1;
        assert_eq!(write(1, &[end])[1], texts[1][..=first]);
    }
}
