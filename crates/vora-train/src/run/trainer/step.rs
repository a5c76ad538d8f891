//! One optimizer step.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use tch::{Kind, Tensor};
use vora_data::Batch;
use vora_llm::DropoutSeed;
use vora_lora::ActsOn;
use vora_run::metrics::{EventKind, EventMetrics, Line, RankMetrics, RewardMetrics, StepMetrics};
use vora_torch::runtime::{memory, peak_memory};

use super::not_finite::NotFinite;
use super::trainer::Trainer;
use crate::anchor::Anchor;
use vora_student::heads::TeacherMean;
use vora_student::{DeviceBatch, Rewards};

/// Training stops after this many skipped steps in a row; by then no single batch is to blame.
const MOST_SKIPPED_IN_A_ROW: u64 = 3;

impl Trainer {
    /// One optimizer step: forward and backward over `gradient_accumulation_steps` micro-batches, which together are
    /// one batch, and AdamW. In f16 a gradient that overflows is left out, with its samples, and the next ones take its
    /// place.
    ///
    /// A step whose loss or gradient is not finite is skipped: no weight and no running mean is touched, the data goes
    /// on, and, as with HF's trainer where a scaler leaves a step out, it is counted as a step done while the learning
    /// rate's schedule waits for the next one that is taken. Its numbers go into the log as an event.
    ///
    /// Of several processes each takes its part of the batch; losses are means over the tokens of all of them, and
    /// gradients their sums: the step is that of one process with the whole batch.
    ///
    /// # Errors
    /// [`NotFinite`] at the third skipped step in a row.
    pub fn train_step(&mut self) -> Result<StepMetrics> {
        let (start, waited) = (Instant::now(), self.ranks.waited());
        let too_long_before = self.loader.num_too_long();
        let batches = self.next_batches()?;
        let data_wait = start.elapsed().as_secs_f64();
        self.refuse_untrained(&batches)?;
        let device = self.student.device();
        let uploaded: Vec<DeviceBatch> = batches.iter().map(|batch| DeviceBatch::new(batch, device)).collect();
        let num_targets = uploaded.iter().map(|batch| self.student.num_targets(batch)).sum::<i64>() as f64;
        let num_image_tokens = uploaded.iter().map(DeviceBatch::num_image_tokens).sum::<i64>() as f64;
        let own = [num_targets, num_image_tokens];
        let mut over_all = own;
        self.ranks.note_step(self.step + 1);
        self.ranks.sum(&mut over_all)?;
        let [num_targets, num_image_tokens] = over_all;

        let distill_weight = self.config.distill.weight_at(self.step, self.schedule.max_steps);
        let scale = self.loss_scale.map_or(1.0, |loss_scale| f64::from(loss_scale.scale));

        self.optimizer.zero_grad()?;
        let zero = || Tensor::zeros([], (Kind::Float, device));
        let (mut loss_lm, mut loss_distill) = (zero(), zero());
        let mut distill_blocks: Option<Tensor> = None; // [blocks]
        let mut rewards: Option<Tensor> = None; // [3]: chosen, rejected, accuracies
        let seed = DropoutSeed::new(self.config.seed).at(self.step);
        let (rank, world_size) = (self.ranks.rank(), self.ranks.world_size());
        let anchored = self.anchor.as_ref().is_some_and(|anchor| anchor.has_texts(self.step, rank, world_size));
        let first = rank * uploaded.len(); // micro-batch of the step
        for (number, batch) in uploaded.iter().enumerate() {
            if number + 1 == uploaded.len() && !anchored {
                self.sync_gradients()?;
            }
            self.student.backward(batch, seed.at((first + number) as u64), |losses| {
                let mut loss = losses.lm_sum / num_targets;
                loss_lm += loss.detach();
                if let Some(Rewards { chosen, rejected, accuracies, .. }) = losses.rewards {
                    let means = Tensor::stack(&[chosen, rejected, accuracies], 0) / num_targets;
                    rewards = Some(rewards.take().map_or_else(|| means.shallow_clone(), |sum| sum + &means));
                }
                let share = batch.num_image_tokens() as f64 / num_image_tokens.max(1.0);
                if let (Some(distill), Some(blocks)) = (losses.distill, losses.distill_blocks) {
                    let (distill, blocks) = (distill * share, blocks * share);
                    loss_distill += distill.detach();
                    loss += distill * distill_weight;
                    let sum = distill_blocks.take().map_or_else(|| blocks.shallow_clone(), |sum| sum + &blocks);
                    distill_blocks = Some(sum);
                }
                if self.loss_scale.is_some() { loss * scale } else { loss }
            })?;
        }
        let anchor_weight = self.anchor.as_ref().map_or(0.0, Anchor::weight);
        if anchored {
            self.sync_gradients()?;
        }
        let loss_anchor = match &self.anchor {
            Some(anchor) => anchor.backward(
                &self.student,
                self.step,
                seed.at(u64::MAX - rank as u64),
                (rank, world_size),
                |loss| {
                    let loss = loss * anchor_weight;
                    if self.loss_scale.is_some() { loss * scale } else { loss }
                },
            )?,
            None => None,
        };
        if let Some(gradients) = &self.gradients {
            if !self.sums_on_the_way() {
                gradients.sync_next()?;
            }
            gradients.finish()?;
        }
        if self.loss_scale.is_some() {
            self.optimizer.scale_gradient(scale.recip())?;
        }

        // The one place where the host waits for the device.
        let has_anchor = loss_anchor.is_some();
        let loss_anchor = loss_anchor.unwrap_or_else(zero);
        let mut read = vec![Tensor::stack(&[loss_lm, loss_distill, loss_anchor, self.optimizer.grad_norm()?], 0)];
        let num_rewards = if self.config.dpo_beta().is_some() { 3 } else { 0 };
        read.extend(rewards);
        let heads = self.student.distill.as_ref().filter(|_| num_image_tokens > 0.0);
        if let Some(distill) = heads {
            // A process whose part has no picture adds nothing to the others' losses.
            let blocks = distill.heads().teacher_blocks().count() as i64;
            read.push(distill_blocks.unwrap_or_else(|| Tensor::zeros([blocks], (Kind::Float, device))));
        }
        let mut read = Vec::<f64>::try_from(Tensor::cat(&read, 0).to_kind(Kind::Double))?;
        // Of this process's own samples alone.
        let share = |loss: f64, over_all: f64, own: f64| if own > 0.0 { loss * over_all / own } else { 0.0 };
        let own_lm = share(read[0], num_targets, own[0]);
        let own_distill = (own[1] > 0.0 && heads.is_some()).then(|| share(read[1], num_image_tokens, own[1]));
        if rank > 0 {
            read[3] = 0.0; // the norm is that of the sum already, the same in every process
        }
        self.ranks.sum(&mut read)?;
        let (loss_lm, loss_distill, loss_anchor) = (read[0], read[1], has_anchor.then_some(read[2]));
        let (rewards, distill_blocks) = read[4..].split_at(num_rewards);
        let (grad_norm, distill_blocks) = (read[3], distill_blocks.to_vec());
        let rewards = match rewards {
            &[chosen, rejected, accuracies] => {
                Some(RewardMetrics { chosen, rejected, accuracies, margins: chosen - rejected })
            }
            _ => None,
        };
        let step = self.step + 1;
        if let Some(loss_scale) = &mut self.loss_scale {
            let overflowed = !grad_norm.is_finite() && read[..3].iter().all(|loss| loss.is_finite());
            loss_scale.update(overflowed);
            // A scale below 1 helps no gradient: it is not finite by itself.
            if overflowed && loss_scale.scale >= 1.0 {
                tracing::warn!(
                    "step {step}: the gradient overflowed f16 and is left out, the scale is {}",
                    loss_scale.scale
                );
                self.seconds += start.elapsed().as_secs_f64();
                return self.train_step();
            }
        }
        let factor = self.schedule.factor(self.step - self.skipped_steps);
        if !read.iter().all(|value| value.is_finite()) {
            let found = self.ranks.join(self.culprits(&batches, &uploaded)?)?;
            let samples = if found.is_empty() { self.ranks.join(ids(&batches))? } else { found };
            self.skip(NotFinite { step, loss_lm, loss_distill, loss_anchor, grad_norm, samples })?;
        } else {
            self.optimizer.step(factor, grad_norm)?;
            if self.config.zero_stage > 0 {
                self.ranks.gather_parameters(&self.optimizer)?;
            }
            if let Some(ema) = &mut self.ema {
                ema.update(self.optimizer.parameters());
            }
            self.skipped_in_a_row = 0;
        }
        let is_skipped = self.skipped_in_a_row > 0;
        self.step = step;

        let seconds = start.elapsed().as_secs_f64();
        self.seconds += seconds;
        let samples = batches.iter().flat_map(|batch| &batch.samples);
        let mut counted = [
            batches.iter().map(|batch| batch.spans.num_tokens()).sum::<i64>() as f64,
            batches.iter().map(|batch| batch.batch * batch.seq).sum::<i64>() as f64,
            samples.clone().count() as f64,
            samples.filter(|sample| sample.cut_answers > 0).count() as f64,
        ];
        let own = counted;
        self.ranks.sum(&mut counted)?;
        let [num_tokens, num_slots, num_samples, truncated] = counted;
        let loss = loss_lm + distill_weight * loss_distill + anchor_weight * loss_anchor.unwrap_or(0.0);
        if !is_skipped && let Some(sigmas) = self.spikes.observe(loss) {
            let samples = self.ranks.join(ids(&batches))?;
            let message =
                format!("step {step}: the loss, {loss:.4}, lies {sigmas:.1} standard deviations above the last ones");
            if self.ranks.is_first() {
                tracing::warn!("{message}, on {}", samples.join(", "));
            }
            self.write(&Line::Event(EventMetrics { step, event: EventKind::LossSpike, message, samples }))?;
        }
        let metrics = StepMetrics {
            step,
            loss,
            loss_lm,
            loss_distill: (!distill_blocks.is_empty()).then_some(loss_distill),
            distill_weight: (self.config.distill.weight_schedule.is_some() && !distill_blocks.is_empty())
                .then_some(distill_weight),
            distill_blocks,
            baseline_distill: self.student.distill.as_ref().and_then(|d| d.mean()).map(TeacherMean::baseline),
            loss_anchor,
            rewards,
            lr: self.config.learning_rate * factor,
            grad_norm,
            samples_per_second: num_samples / seconds,
            tokens_per_second: num_tokens / seconds,
            padding_share: 1.0 - num_tokens / num_slots,
            truncated: truncated as u64,
            too_long: self.loader.num_too_long() - too_long_before,
            data_wait,
            memory: memory(self.student.device()),
            skipped_steps: self.skipped_steps,
            seconds: self.seconds,
        };
        self.truncated += metrics.truncated;
        if is_skipped {
            return Ok(metrics);
        }
        if step.is_multiple_of(self.config.logging_steps) || step == self.schedule.max_steps {
            self.write(&Line::Step(metrics.clone()))?;
            if let Some(log) = &mut self.rank_metrics {
                log.write(&RankMetrics {
                    step,
                    rank: rank as u64,
                    loss: own_lm + distill_weight * own_distill.unwrap_or(0.0),
                    loss_lm: own_lm,
                    loss_distill: own_distill,
                    samples: own[2] as u64,
                    tokens: own[0] as u64,
                    step_time: start.elapsed().as_secs_f64(),
                    wait: (self.ranks.waited() - waited).as_secs_f64(),
                    data_wait,
                    memory: metrics.memory,
                    peak_memory: peak_memory(self.student.device()),
                })?;
            }
            if let Some(board) = &mut self.board {
                board.step(&metrics)?;
            }
        }
        Ok(metrics)
    }

    /// The backward pass to come is the step's last: sums over all processes begin on its way.
    fn sync_gradients(&self) -> Result<()> {
        match &self.gradients {
            Some(gradients) if self.sums_on_the_way() => gradients.sync_next(),
            _ => Ok(()),
        }
    }

    /// Whether gradients are summed while the backward pass goes on. Not where it brings a parameter its gradient in two
    /// parts: where embeddings are a head as well, and layers are computed anew from there, one after the other. Nor where it
    /// gathers weights on its way: which sums have begun by then depends on what a process's pictures reach, and collectives
    /// are to come in one order.
    fn sums_on_the_way(&self) -> bool {
        let llm = self.student.model.llm();
        let in_two_parts = !self.config.model.freezes_llm() && llm.config().tie_word_embeddings;
        !(self.config.gradient_checkpointing && in_two_parts) && llm.decoder().shards().is_none()
    }

    /// Counts and tells of a step that is not finite.
    fn skip(&mut self, refused: NotFinite) -> Result<()> {
        self.skipped_steps += 1;
        self.skipped_in_a_row += 1;
        let message = refused.to_string();
        if self.ranks.is_first() {
            tracing::warn!("skipped: {message}");
        }
        self.write(&Line::Event(EventMetrics {
            step: refused.step,
            event: EventKind::SkippedStep,
            message,
            samples: refused.samples.clone(),
        }))?;
        if self.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW {
            let in_a_row = format!("{MOST_SKIPPED_IN_A_ROW} steps in a row were skipped");
            return Err(anyhow::Error::new(refused).context(in_a_row));
        }
        Ok(())
    }

    /// Samples without a picture are refused where adapters act on nothing of them.
    fn refuse_untrained(&self, batches: &[Batch]) -> Result<()> {
        let acts_on = self.student.model.adapted().acts_on();
        if acts_on == ActsOn::All {
            return Ok(());
        }
        for batch in batches {
            for sample in &batch.samples {
                ensure!(
                    sample.num_images > 0,
                    "record {} has no picture, and the adapters act on `{acts_on}`: it would train nothing; leave such \
                     records out, or set model.lora.acts_on=all",
                    sample.id
                );
            }
        }
        Ok(())
    }

    pub(super) fn next_batches(&mut self) -> Result<Vec<Batch>> {
        let next = |_| self.loader.next().context("the data has come to its end")?;
        (0..self.config.gradient_accumulation_steps).map(next).collect()
    }

    /// Whose hidden states are not finite; none where no single sample is to blame.
    fn culprits(&self, batches: &[Batch], uploaded: &[DeviceBatch]) -> Result<Vec<String>> {
        let mut found = Vec::new();
        for (batch, uploaded) in batches.iter().zip(uploaded) {
            let output = tch::no_grad(|| self.student.model.forward(&uploaded.input, 0))?;
            for sample in &batch.samples {
                let (start, len) = (sample.tokens.start as i64, sample.tokens.len() as i64);
                let hidden = output.last_hidden_state.get(sample.row as i64).narrow(0, start, len); // [len, hidden]
                if hidden.isfinite().all().int64_value(&[]) == 0 {
                    found.push(sample.id.clone());
                }
            }
        }
        Ok(found)
    }
}

fn ids(batches: &[Batch]) -> Vec<String> {
    batches.iter().flat_map(|batch| &batch.samples).map(|sample| sample.id.clone()).collect()
}
