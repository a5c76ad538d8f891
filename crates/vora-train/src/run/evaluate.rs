//! Exact match by question type, of descriptions and boxes by what they tell, always beside the blind control: the same questions about another picture.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use tch::Tensor;
use vora_data::{Batch, Loader, LoaderConfig};
use vora_eval::{Tally, greedy_answers, show_other_pictures, spoken};
use vora_recipe::TrainConfig;
use vora_run::eval::EvalReport;
use vora_text::Tokenizer;

use crate::data::HeldOut;
use crate::run::progress::Progress;
use crate::run::ranks::Ranks;
use vora_student::{DeviceBatch, Student};

/// Asks every question of every split, with its picture and with another one; none where `stop` was set meanwhile. Several
/// processes take the batches in turn.
pub(crate) fn evaluate(
    student: &Student,
    tokenizer: &Tokenizer,
    splits: &[HeldOut],
    config: &TrainConfig,
    ranks: &Ranks,
    stop: &AtomicBool,
    progress: &mut dyn Progress,
) -> Result<Option<EvalReport>> {
    let (batch_size, num_workers) = (config.per_device_eval_batch_size, config.dataloader_num_workers);
    let total = splits.iter().map(|split| (split.samples as usize).div_ceil(batch_size)).sum();
    let mut done = 0;
    let mut report = EvalReport::default();
    for split in splits {
        let shares_starts = student.shares_starts();
        let mut tally = Tally::default();
        let mut is_stopped = false;
        student.apart(|| {
            for (start, end) in parts(split.samples, batch_size as u64, ranks) {
                let walk = LoaderConfig {
                    batch_size,
                    num_workers,
                    start,
                    end: Some(end),
                    shares_starts,
                    ..LoaderConfig::default()
                };
                for batch in Loader::new(split.source.clone(), walk)? {
                    is_stopped |= stop.load(Ordering::Relaxed);
                    if is_stopped {
                        break;
                    }
                    ask(student, tokenizer, batch?, &mut tally)?;
                    done += ranks.world_size();
                    progress.evaluating(done.min(total), total);
                }
            }
            Ok(())
        })?;
        if ranks.any(is_stopped)? {
            return Ok(None);
        }
        if ranks.are_several() {
            let tallies = ranks.gather(serde_json::to_vec(&tally)?)?;
            tally = Tally::default();
            for theirs in tallies {
                tally.merge(serde_json::from_slice(&theirs)?);
            }
        }
        report.0.insert(split.name.clone(), tally.scores());
    }
    Ok(Some(report))
}

/// Where in a split's walk this process asks, by first sample and end: all of it, or every so many-th batch.
fn parts(samples: u64, batch_size: u64, ranks: &Ranks) -> Vec<(u64, u64)> {
    if !ranks.are_several() {
        return vec![(0, samples)];
    }
    let starts = (0..samples).step_by(batch_size as usize).skip(ranks.rank()).step_by(ranks.world_size());
    starts.map(|start| (start, (start + batch_size).min(samples))).collect()
}

/// Asks a batch's questions with their pictures and with others.
fn ask(student: &Student, tokenizer: &Tokenizer, mut batch: Batch, tally: &mut Tally) -> Result<()> {
    for (kind, right) in answers(student, tokenizer, &batch)? {
        tally.add(&kind, right);
    }
    let is_blind = show_other_pictures(&mut batch);
    for ((kind, right), _) in
        answers(student, tokenizer, &batch)?.into_iter().zip(is_blind).filter(|(_, is_blind)| *is_blind)
    {
        tally.add_blind(&kind, right);
    }
    Ok(())
}

/// Each question's type and whether it is answered right: all tokens of its answer are the most likely ones.
///
/// Under teacher forcing that is so exactly when greedy decoding gives the answer. Of descriptions and boxes many are right:
/// they are decoded greedily, and what they tell is compared.
fn answers(student: &Student, tokenizer: &Tokenizer, batch: &Batch) -> Result<Vec<(String, bool)>> {
    let uploaded = DeviceBatch::new(batch, student.device());
    let right = tch::no_grad(|| right_tokens(&student.answer_logits(&uploaded)?, &uploaded.targets))?;
    let said = spoken(batch, |prompts, most| {
        greedy_answers(&*student.model, tokenizer, &DeviceBatch::new(prompts, student.device()).input, most)
    })?;
    let is_right = |said: Option<bool>, tokens: Range<usize>| said.unwrap_or_else(|| right[tokens].iter().all(|&r| r));
    let asked = batch.questions().zip(said);
    Ok(asked.map(|((question, tokens), said)| (question.kind.clone(), is_right(said, tokens))).collect())
}

/// Whether the most likely token is the right one at each position: `[n, vocab]`, `[n]` -> n.
fn right_tokens(logits: &Tensor, targets: &Tensor) -> Result<Vec<bool>> {
    Vec::<bool>::try_from(logits.argmax(-1, false).eq_tensor(targets)).context("reading which tokens are right")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_likeliest_token_counts() {
        let logits = Tensor::from_slice2(&[[0.1f32, 0.9, 0.0], [0.5, 0.4, 0.1]]);
        assert_eq!(right_tokens(&logits, &Tensor::from_slice(&[1i64, 1])).unwrap(), [true, false]);
    }
}
