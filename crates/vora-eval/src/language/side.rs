//! One of the two models that are compared.

use anyhow::Result;
use tch::Tensor;
use vora_llm::{AttentionPlan, CausalLm, VisionAttention};
use vora_lora::ActsOn;
use vora_text::Spans;

/// A language model with its adapters, where it has some apart from its weights, on the tokens of a rule: a text has no
/// picture, so that by `with_image` they are off.
#[derive(Debug, Clone, Copy)]
pub struct Side<'a> {
    /// The model.
    pub llm: &'a CausalLm,
    /// The tokens that its adapters act on.
    pub acts_on: ActsOn,
}

impl<'a> Side<'a> {
    /// A model without adapters apart from its weights, or with adapters that act on every token.
    pub fn whole(llm: &'a CausalLm) -> Self {
        Self { llm, acts_on: ActsOn::All }
    }

    /// The model below its adapters.
    pub fn frozen(llm: &'a CausalLm) -> Self {
        Self { llm, acts_on: ActsOn::WithImage }
    }
}

impl Side<'_> {
    /// The likeliest tokens after each prompt, up to `max_new_tokens` or one of `stop`, which is the last.
    pub(super) fn greedy(&self, prompts: &[Vec<i64>], stop: &[i64], max_new_tokens: usize) -> Result<Vec<Vec<i64>>> {
        let (input_ids, plan) = self.rows(prompts)?;
        let mut cache = self.llm.new_cache(prompts.len() as i64, input_ids.size()[1] + max_new_tokens as i64)?;
        let mut logits = self.llm.prefill(&self.llm.embed(&input_ids), &plan, &mut cache)?; // [rows, vocab]
        let mut texts = vec![Vec::new(); prompts.len()];
        let mut is_open = vec![true; prompts.len()];
        for _ in 0..max_new_tokens {
            let next = logits.argmax(-1, false);
            for ((text, is_open), token) in texts.iter_mut().zip(&mut is_open).zip(Vec::<i64>::try_from(&next)?) {
                if *is_open {
                    text.push(token);
                    *is_open = !stop.contains(&token);
                }
            }
            if !is_open.contains(&true) {
                break;
            }
            logits = self.llm.decode_step(&next.unsqueeze(1), &mut cache)?;
        }
        Ok(texts)
    }

    /// The likeliest token at each token of `answers` after `prompts`, told what stands before it.
    pub(super) fn forced(&self, prompts: &[Vec<i64>], answers: &[Vec<i64>]) -> Result<Vec<Vec<i64>>> {
        let whole: Vec<Vec<i64>> = prompts.iter().zip(answers).map(|(p, a)| [p.as_slice(), a].concat()).collect();
        let (input_ids, plan) = self.rows(&whole)?;
        tch::no_grad(|| {
            let embeds = self.llm.embed(&input_ids);
            let hidden = self.llm.decoder().forward(&embeds, &plan, 0).last_hidden_state; // [rows, seq, hidden]
            let likeliest = |(row, (prompt, answer)): (i64, (&Vec<i64>, &Vec<i64>))| {
                let places = hidden.get(row).narrow(0, prompt.len() as i64 - 1, answer.len() as i64);
                Ok(Vec::<i64>::try_from(self.llm.logits(&places).argmax(-1, false))?)
            };
            (0..).zip(prompts.iter().zip(answers)).map(likeliest).collect()
        })
    }

    /// Texts as rows, `[rows, seq]`, and how attention goes over them.
    fn rows(&self, texts: &[Vec<i64>]) -> Result<(Tensor, AttentionPlan)> {
        let (ids, spans) = Spans::padded(texts);
        let plan = AttentionPlan::new(&spans, VisionAttention::Causal, self.llm.device(), self.llm.kind())?;
        let input_ids = Tensor::from_slice(&ids).view([-1, spans.seq()]).to_device(self.llm.device());
        Ok((input_ids, plan.with_adapters(self.acts_on)))
    }
}
