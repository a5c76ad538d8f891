//! Texts that an LLM writes itself: sampled from the frozen weights, with a seed.

use anyhow::{Context, Result};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Kind, Tensor};
use vora_data::Preparation;
use vora_llm::{CausalLm, GenerationConfig};
use vora_recipe::TextAnchor;
use vora_text::{Message, Piece};

use super::held::Held;
use super::prompts::{QUESTIONS, STARTS};

/// Texts that are written side by side.
const ROWS: usize = 48;

/// Tokens at most of a question that the LLM asks itself.
const QUESTION_LENGTH: usize = 40;

/// Writes `count` texts, with the adapters off. Half of them answer a question in the run's
/// own chat template, and the answer alone is held; half of the questions are the LLM's own.
///
/// # Errors
/// Where the chat template does not take a question, or the LLM's context is shorter than a beginning.
pub(super) fn write(
    llm: &CausalLm,
    preparation: &Preparation,
    config: &TextAnchor,
    count: usize,
    seed: u64,
) -> Result<Vec<Held>> {
    let mut writer = Writer {
        llm,
        stop: preparation.tokenizer.eos_ids(),
        temperature: config.temperature,
        random: ChaCha8Rng::seed_from_u64(seed),
    };
    let num_chats = count / 2;
    let own = writer.ask(preparation, num_chats / 2)?;
    let questions = (0..num_chats).map(|i| match own.get(i / 2).filter(|_| i % 2 == 1) {
        Some(question) => question.as_str(),
        None => QUESTIONS[i / 2 % QUESTIONS.len()],
    });
    let chats = questions.map(|question| Ok((chat(preparation, question)?, true)));
    let starts = (0..count - num_chats).map(|i| STARTS[i % STARTS.len()]);
    let starts = starts.map(|start| Ok((preparation.tokenizer.encode(start)?, false)));
    let mut prompts = starts.chain(chats).collect::<Result<Vec<(Vec<i64>, bool)>>>()?;
    for (prompt, _) in &mut prompts {
        prompt.truncate(config.max_length - 1);
    }
    let mut texts = Vec::with_capacity(prompts.len());
    for prompts in prompts.chunks(ROWS) {
        let written =
            writer.go_on(&prompts.iter().map(|(ids, _)| ids.clone()).collect::<Vec<_>>(), config.max_length)?;
        texts.extend(written.into_iter().zip(prompts).map(|(ids, (prompt, is_chat))| {
            // The last token of the prompt is what foretells the answer's first.
            Held { from: if *is_chat { prompt.len().saturating_sub(1) } else { 0 }, ids }
        }));
    }
    Ok(texts)
}

/// A chat up to where the answer to `question` begins.
fn chat(preparation: &Preparation, question: &str) -> Result<Vec<i64>> {
    let message = Message::new("user", question);
    let pieces = preparation.chat.encode_prompt(&preparation.tokenizer, &[message]).context("text_anchor")?;
    let ids = pieces.into_iter().filter_map(|piece| match piece {
        Piece::Text { ids, .. } => Some(ids),
        Piece::Image => None,
    });
    Ok(ids.flatten().collect())
}

/// An LLM that goes on with what it is given, its adapters off.
struct Writer<'a> {
    llm: &'a CausalLm,
    /// The tokens that end a text.
    stop: &'a [i64],
    temperature: f64,
    random: ChaCha8Rng,
}

impl Writer<'_> {
    /// Questions that the LLM asks where its chat template begins a user's turn (Magpie, arXiv 2406.08464). Some of an LLM
    /// that was not taught to chat are none; those that are blank are left out.
    fn ask(&mut self, preparation: &Preparation, count: usize) -> Result<Vec<String>> {
        let [one, other] = [chat(preparation, "A")?, chat(preparation, "1")?];
        let start: Vec<i64> = one.iter().zip(&other).take_while(|(a, b)| a == b).map(|(id, _)| *id).collect();
        let mut questions = Vec::with_capacity(count);
        while !start.is_empty() && questions.len() < count {
            let rows = vec![start.clone(); ROWS.min(count - questions.len())];
            for ids in self.go_on(&rows, start.len() + QUESTION_LENGTH)? {
                questions.push(preparation.tokenizer.decode(&ids[start.len()..], true)?.trim().to_owned());
            }
        }
        questions.retain(|question| !question.is_empty());
        Ok(questions)
    }

    /// Each prompt with what the LLM adds to it, up to `max_length` tokens or one that ends a text, which is part of it.
    fn go_on(&mut self, prompts: &[Vec<i64>], max_length: usize) -> Result<Vec<Vec<i64>>> {
        let config = GenerationConfig::new(max_length).with_eos_token_id(self.stop).without_adapters();
        self.llm.generate(prompts, &config, |logits| draw(logits, self.temperature, &mut self.random))
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
        let write = |seed, stop: &[i64]| {
            let random = ChaCha8Rng::seed_from_u64(seed);
            Writer { llm: &llm, stop, temperature: 1.0, random }.go_on(&prompts, 12).unwrap()
        };
        let texts = write(1, &[]);
        assert!(texts.iter().zip(&prompts).all(|(text, prompt)| text.len() == 12 && text.starts_with(prompt)));
        assert_eq!(write(1, &[]), texts);
        assert_ne!(write(2, &[]), texts);
        let end = texts[1][6];
        let first = texts[1][1..].iter().position(|token| *token == end).unwrap() + 1;
        assert_eq!(write(1, &[end])[1], texts[1][..=first]);
    }
}
