//! The loss that holds an adapted LLM to what it was, on a few texts a step.

use anyhow::{Result, ensure};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use tch::{Kind, Tensor};
use vora_llm::{AttentionPlan, CausalLm, DropoutSeed, VisionAttention};
use vora_lora::ActsOn;
use vora_recipe::TextAnchor;
use vora_text::Spans;
use vora_torch::nn::loss::kl_divergence;

use super::held::Held;
use super::texts::Texts;
use vora_student::{Student, logits_rows};

/// Texts whose states are computed side by side before the run.
const ROWS: usize = 8;

/// The anchor of a run. What the frozen LLM makes of each text is computed once, as the last hidden state of every token
/// that is held: the head, which nobody trains, makes the whole distribution of it at each step, in the memory of one step.
#[derive(Debug)]
pub(crate) struct Anchor {
    config: TextAnchor,
    seed: u64,
    texts: Vec<Held>,
    frozen: Vec<Tensor>, // [tokens that foretell what is held, hidden] each, in the model's dtype
}

impl Anchor {
    /// Runs the LLM with its adapters off over all texts.
    ///
    /// # Errors
    /// Where a text has a token beyond the embedding, or more tokens than the LLM's context.
    pub(crate) fn new(config: TextAnchor, seed: u64, texts: &Texts, llm: &CausalLm) -> Result<Self> {
        let (vocab, context) = (llm.config().vocab_size, llm.config().max_position_embeddings);
        let texts: Vec<Held> = texts.held().cloned().collect();
        ensure!(!texts.is_empty(), "text_anchor has no texts");
        for Held { ids, from } in &texts {
            ensure!(ids.len() > 1, "a text of text_anchor has {} tokens, it takes two", ids.len());
            ensure!(ids.iter().all(|id| (0..vocab).contains(id)), "a text of text_anchor has a token beyond {vocab}");
            ensure!(ids.len() as i64 <= context, "text_anchor.max_length is above the LLM's context, {context}");
            ensure!(
                *from < ids.len(),
                "a text of text_anchor has {} tokens and is held from number {from} on",
                ids.len()
            );
        }
        let mut frozen = Vec::with_capacity(texts.len());
        for rows in texts.chunks(ROWS) {
            let batch = TextBatch::new(&rows.iter().collect::<Vec<_>>(), llm);
            let plan = batch.plan(llm)?.without_adapters();
            let states = tch::no_grad(|| {
                let output = llm.decoder().forward(&llm.embed(&batch.input_ids), &plan, 0);
                output.last_hidden_state.flatten(0, 1).index_select(0, &batch.places) // [tokens, hidden]
            });
            let lens: Vec<i64> = rows.iter().map(|text| (text.ids.len() - text.from) as i64).collect();
            frozen.extend(states.split_with_sizes(lens.as_slice(), 0).iter().map(Tensor::copy));
        }
        Ok(Self { config, seed, texts, frozen })
    }

    /// What the loss is multiplied with.
    pub(crate) fn weight(&self) -> f64 {
        self.config.weight
    }

    /// The texts that the step of this number takes, none where it takes none: pass after pass over all of them, each in an
    /// order of its own.
    fn taken(&self, step: u64) -> Vec<usize> {
        if !step.is_multiple_of(self.config.every) {
            return Vec::new();
        }
        let (num_texts, a_step) = (self.texts.len() as u64, self.config.texts_a_step() as u64);
        let first = step / self.config.every * a_step;
        let mut orders: Option<(u64, Vec<usize>)> = None;
        let mut taken = Vec::new();
        for place in first..first + a_step {
            let pass = place / num_texts;
            if orders.as_ref().is_none_or(|(of, _)| *of != pass) {
                let mut order: Vec<usize> = (0..self.texts.len()).collect();
                order.shuffle(&mut ChaCha8Rng::seed_from_u64(self.seed ^ pass.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
                orders = Some((pass, order));
            }
            taken.extend(orders.as_ref().map(|(_, order)| order[(place % num_texts) as usize]));
        }
        taken
    }

    /// The texts that a step takes.
    #[cfg(test)]
    pub(crate) fn texts_of(&self, step: u64) -> Vec<Held> {
        self.taken(step).into_iter().map(|i| self.texts[i].clone()).collect()
    }

    /// Whether any of the texts that the step of this number takes fall to `rank` of `world_size` processes.
    pub(crate) fn has_texts(&self, step: u64, rank: usize, world_size: usize) -> bool {
        self.taken(step).into_iter().skip(rank).step_by(world_size).next().is_some()
    }

    /// `KL(frozen || adapted)`, mean over what is held of the texts that this step takes, with the adapters on; `total` makes
    /// of it what goes backward. Of several processes each has its part of the texts, and of the mean: together they make it.
    /// The value without a graph, none where the step takes no text.
    ///
    /// # Errors
    /// What libtorch says of the way back.
    pub(crate) fn backward(
        &self,
        student: &Student,
        step: u64,
        seed: DropoutSeed,
        (rank, world_size): (usize, usize),
        total: impl FnOnce(&Tensor) -> Tensor,
    ) -> Result<Option<Tensor>> {
        let all = self.taken(step);
        let llm = student.model.llm();
        if all.is_empty() {
            return Ok(None);
        }
        let held: i64 = all.iter().map(|i| self.frozen[*i].size()[0]).sum();
        let taken: Vec<usize> = all.into_iter().skip(rank).step_by(world_size).collect();
        if taken.is_empty() {
            llm.decoder().gather_forward(); // as the others do who have texts
            llm.decoder().gather_backward();
            return Ok(Some(Tensor::zeros([], (Kind::Float, llm.device()))));
        }
        let texts: Vec<&Held> = taken.iter().map(|i| &self.texts[*i]).collect();
        let batch = TextBatch::new(&texts, llm);
        let frozen = Tensor::cat(&taken.iter().map(|i| &self.frozen[*i]).collect::<Vec<_>>(), 0); // [tokens, hidden]
        let plan = batch.plan(llm)?.with_adapters(ActsOn::All);
        let pass = student.pass(&llm.embed(&batch.input_ids), &plan, 0, seed);
        let mut value = None;
        pass.backward(|output| {
            let hidden = output.last_hidden_state.flatten(0, 1).index_select(0, &batch.places); // [tokens, hidden]
            let sum = kl_divergence(&hidden, &frozen, logits_rows(llm), |rows| llm.logits(rows));
            let mean = sum / held as f64;
            value = Some(mean.detach());
            Ok(total(&mean))
        })?;
        Ok(value.map(|mean| mean.to_kind(Kind::Float)))
    }
}

/// Texts as rows, padded at their ends.
struct TextBatch {
    input_ids: Tensor, // [rows, seq]
    places: Tensor,    // [tokens]: those of rows * seq that foretell what is held
    spans: Spans,
}

impl TextBatch {
    fn new(texts: &[&Held], llm: &CausalLm) -> Self {
        let (ids, spans) = Spans::padded(&texts.iter().map(|text| &text.ids).collect::<Vec<_>>());
        let seq = spans.seq();
        let starts = (0..).map(|row| row * seq);
        let held = starts.zip(texts).map(|(start, text)| start + text.from as i64..start + text.ids.len() as i64);
        let places: Vec<i64> = held.flatten().collect();
        let tensor = |values: &[i64]| Tensor::from_slice(values).to_device(llm.device());
        Self { input_ids: tensor(&ids).view([-1, seq]), places: tensor(&places), spans }
    }

    fn plan(&self, llm: &CausalLm) -> Result<AttentionPlan> {
        AttentionPlan::new(&self.spans, VisionAttention::Causal, llm.device(), llm.kind())
    }
}
