//! Two models side by side on text.

use anyhow::{Context, Result, ensure};
use vora_run::language::Language;
use vora_text::{ChatTemplate, Message, Piece, Tokenizer};

use super::chat::QUESTIONS;
use super::side::Side;
use crate::perplexity;

/// English prose about programs, some 3,500 tokens: parts of this project's own pages.
const PROSE: &str = include_str!("prose.md");

/// Tokens of it that count; fewer than it has where a tokenizer cuts it small.
const TOKENS: usize = 4096;

/// Tokens of a window over the prose; the next begins half of it later.
const WINDOW: usize = 1024;

/// Tokens of an answer at most.
const ANSWER: usize = 64;

/// Compares a model with the one that it was, `base`, on prose and on chats.
///
/// # Errors
/// Where tokenizer or chat template do not fit the models.
pub fn language(base: Side<'_>, this: Side<'_>, tokenizer: &Tokenizer, chat: &ChatTemplate) -> Result<Language> {
    let mut prose = tokenizer.encode_whole(PROSE)?;
    prose.truncate(TOKENS);
    let context = base.llm.config().max_position_embeddings.min(this.llm.config().max_position_embeddings);
    let window = WINDOW.min(usize::try_from(context)?);
    let of = |side: Side<'_>| perplexity(side.llm, side.acts_on, &prose, window, window / 2);
    let (before, after) = (of(base)?, of(this)?);

    let prompts = QUESTIONS.iter().map(|question| prompt(question, tokenizer, chat)).collect::<Result<Vec<_>>>()?;
    let longest = prompts.iter().map(Vec::len).max().context("there are questions")?;
    let room = usize::try_from(context)?.saturating_sub(longest).min(ANSWER);
    ensure!(room > 0, "the model's context, {context}, is too short for a question in its chat template");
    let stop = tokenizer.eos_ids();
    let answers = base.greedy(&prompts, stop, room)?;
    let own = if this.acts_on == base.acts_on && std::ptr::eq(this.llm, base.llm) {
        answers.clone()
    } else {
        this.greedy(&prompts, stop, room)?
    };
    let forced = this.forced(&prompts, &answers)?;
    let agreeing = answers.iter().flatten().zip(forced.iter().flatten()).filter(|(a, b)| a == b).count();
    let chat_tokens = answers.iter().map(Vec::len).sum::<usize>();
    Ok(Language {
        tokens: before.tokens,
        base_perplexity: before.perplexity,
        perplexity: after.perplexity,
        chat_tokens: chat_tokens as u64,
        agreement: agreeing as f64 / chat_tokens as f64,
        chats: answers.len() as u64,
        same_chats: answers.iter().zip(&own).filter(|(a, b)| a == b).count() as u64,
    })
}

/// A question in the model's chat template.
fn prompt(question: &str, tokenizer: &Tokenizer, chat: &ChatTemplate) -> Result<Vec<i64>> {
    let pieces = chat.encode_prompt(tokenizer, &[Message::new("user", question)])?;
    let ids = pieces.into_iter().map(|piece| match piece {
        Piece::Text { ids, .. } => ids,
        Piece::Image => Vec::new(),
    });
    Ok(ids.flatten().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};
    use vora_llm::{CausalLm, LlmConfig};
    use vora_lora::{LoraConfig, attach_all};
    use vora_torch::weights::Weights;

    fn adapted(size: f64) -> CausalLm {
        let config = LlmConfig { max_position_embeddings: 4096, ..LlmConfig::tiny(512) };
        let weights = Weights::random(1, Device::Cpu, Kind::Float).with_initializer_range(0.2);
        let mut llm = CausalLm::load(&config, &weights).unwrap();
        let adapters = Weights::random(2, Device::Cpu, Kind::Float);
        attach_all("a", &LoraConfig::new(2, 2), &adapters, |visit| llm.linears_mut(visit)).unwrap();
        for (name, tensor) in adapters.parameters() {
            if name.contains("lora_B") {
                let values = fixtures::Random::new(3).normal(tensor.size()) * size;
                tch::no_grad(|| tensor.shallow_clone().copy_(&values));
            }
        }
        llm
    }

    fn measured(base: Side<'_>, this: Side<'_>) -> Language {
        let folder = fixtures::root().join("tiny/tokenizer");
        let (tokenizer, chat) = (Tokenizer::open(&folder).unwrap(), ChatTemplate::open(&folder).unwrap());
        language(base, this, &tokenizer, &chat).unwrap()
    }

    #[test]
    fn a_model_keeps_all_that_its_adapters_leave_alone() {
        let llm = adapted(0.3);
        let off = measured(Side::frozen(&llm), Side::frozen(&llm));
        assert_eq!((off.ratio(), off.agreement, off.same_chats), (1.0, 1.0, 20));
        assert!(off.tokens > 1000 && off.chat_tokens > 20);
        let on = measured(Side::frozen(&llm), Side::whole(&llm));
        assert!(on.ratio() != 1.0 && on.agreement < 1.0 && on.same_chats < 20, "{on:?}");
        assert_eq!((on.base_perplexity, on.chat_tokens), (off.base_perplexity, off.chat_tokens));
        // An adapter whose B is zero is none, and says the same through its cache and at once.
        let same = adapted(0.0);
        let zero = measured(Side::frozen(&same), Side::whole(&same));
        assert_eq!((zero.agreement, zero.same_chats), (1.0, 20));
        assert!((zero.ratio() - 1.0).abs() < 1e-6);
    }
}
