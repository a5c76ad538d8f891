//! What a decoder answers from: prompts and steps over a [`KvCache`], and over the pages of many sequences.

use anyhow::{Result, ensure};
use tch::{Tensor, nn::Module};

use super::causal_lm::CausalLm;
use crate::attention::AttentionPlan;
use crate::kv_cache::KvCache;
use crate::kv_pages::{KvPages, PagedRow};

impl CausalLm {
    /// A cache for this model.
    ///
    /// # Errors
    /// See [`KvCache::new`].
    pub fn new_cache(&self, batch: i64, capacity: i64) -> Result<KvCache> {
        KvCache::new(self.config(), batch, capacity, self.device(), self.kind())
    }

    /// Fills an empty cache: `[batch, seq, hidden]` -> logits of each row's last token `[batch, vocab]`
    ///
    /// # Errors
    /// [`CacheError`](crate::CacheError) where the batch does not fit into the cache; rows that cannot be continued.
    pub fn prefill(&self, inputs_embeds: &Tensor, plan: &AttentionPlan, cache: &mut KvCache) -> Result<Tensor> {
        let lens = plan.row_lens();
        ensure!(
            plan.is_cacheable(),
            "several documents or branches in one row: only a row of one document can be continued"
        );
        cache.check_prefill(lens)?;
        Ok(tch::no_grad(|| {
            let shared = self.model.shared(plan);
            let x = self.model.through(inputs_embeds, |_, layer, x| {
                layer.prefill(x, &shared.cos_sin, shared.by(layer), &mut cache.layers[layer.cache_idx()])
            }); // [batch, seq, hidden]
            cache.filled(lens, plan.adapted_rows());
            let rows: Vec<Tensor> = (0..).zip(lens).map(|(row, len)| x.get(row).get(len - 1)).collect();
            self.logits(&self.model.norm.forward(&Tensor::stack(&rows, 0)))
        }))
    }

    /// One more token for every row: `[batch, 1]` -> logits `[batch, vocab]`
    ///
    /// # Errors
    /// [`CacheError`](crate::CacheError) where the cache is empty, full, or for another number of rows; more than one
    /// token a row.
    pub fn decode_step(&self, input_ids: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        let (batch, new) = input_ids.size2()?;
        ensure!(new == 1, "{new} tokens a row in one decoding step");
        let step = cache.next_step(batch)?;
        Ok(tch::no_grad(|| {
            let shared = self.model.shared_step(&step);
            let x = self.model.through(&self.embed(input_ids), |_, layer, x| {
                layer.decode_step(x, &shared.cos_sin, shared.by(layer), &mut cache.layers[layer.cache_idx()])
            }); // [batch, 1, hidden]
            cache.stepped();
            self.logits(&self.model.norm.forward(&x.squeeze_dim(1)))
        }))
    }

    /// Goes on with a sequence by the part of its tokens that `plan` is [a part](AttentionPlan::part) of: their embeddings
    /// `[1, part, hidden]` -> logits of the last of them `[1, vocab]`. What comes before them lies in `row`'s pages, where their
    /// keys and values go too.
    ///
    /// # Errors
    /// Where `row` does not hold what comes before the part, or has no pages for it.
    pub fn prefill_pages(
        &self,
        inputs_embeds: &Tensor,
        plan: &AttentionPlan,
        row: &PagedRow<'_>,
        cache: &mut KvPages,
    ) -> Result<Tensor> {
        let part = plan.part_of_row();
        let (batch, new, _) = inputs_embeds.size3()?;
        ensure!(plan.is_cacheable() && batch == 1, "only one row of one document goes through in parts");
        ensure!(
            (row.len, new) == (part.start, part.end - part.start),
            "{new} tokens after {}, where the plan has {part:?}",
            row.len
        );
        cache.check(&[*row], new)?;
        let places = cache.places(&[*row], new);
        Ok(tch::no_grad(|| {
            let shared = self.model.shared(plan);
            let x = self.model.through(inputs_embeds, |_, layer, x| {
                let kept = (&mut cache.layers[layer.cache_idx()], &places);
                layer.prefill_pages(x, &shared.cos_sin, shared.by(layer), kept)
            }); // [1, part, hidden]
            self.logits(&self.model.norm.forward(&x.select(1, -1)))
        }))
    }

    /// One more token for every row: ids `[rows]` -> logits `[rows, vocab]`
    ///
    /// # Errors
    /// Where ids and rows differ in number, or a row has no page for one more token.
    pub fn decode_pages(&self, input_ids: &[i64], rows: &[PagedRow<'_>], cache: &mut KvPages) -> Result<Tensor> {
        ensure!(input_ids.len() == rows.len(), "{} tokens for {} rows", input_ids.len(), rows.len());
        cache.check(rows, 1)?;
        let (step, places) = (cache.next_step(rows), cache.places(rows, 1));
        Ok(tch::no_grad(|| {
            let shared = self.model.shared_step(&step);
            let ids = Tensor::from_slice(input_ids).unsqueeze(1).to_device(self.device()); // [rows, 1]
            let x = self.model.through(&self.embed(&ids), |_, layer, x| {
                let kept = (&mut cache.layers[layer.cache_idx()], &places);
                layer.decode_pages(x, &shared.cos_sin, shared.by(layer), kept)
            }); // [rows, 1, hidden]
            self.logits(&self.model.norm.forward(&x.squeeze_dim(1)))
        }))
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};
    use vora_text::{Span, Spans};
    use vora_torch::nn::decode::LoraId;
    use vora_torch::weights::Weights;

    use super::super::causal_lm::tests::{llama, plan, text};
    use super::*;
    use crate::{CacheError, LlmConfig, VisionAttention};

    #[test]
    fn decoding_step_by_step_matches_reference() {
        let golden = fixtures::open("llama");
        let llm = llama(&golden);
        let (prompts, continuation) = (&golden["steps.prompts"], &golden["steps.continuation"]);
        let mut cache = llm.new_cache(2, 12).unwrap();
        for _ in 0..2 {
            cache.reset();
            let mut logits = vec![llm.prefill(&llm.embed(prompts), &text(&[5, 8]), &mut cache).unwrap()];
            for step in 0..4 {
                logits.push(llm.decode_step(&continuation.narrow(1, step, 1), &mut cache).unwrap());
            }
            assert_eq!(cache.lens(), [9, 12]);
            fixtures::assert_close_to(&Tensor::stack(&logits, 1), &golden["steps.logits"], 2e-5);
        }
        let error = llm.decode_step(&continuation.narrow(1, 0, 1), &mut cache).unwrap_err();
        assert_eq!(error.downcast_ref(), Some(&CacheError::Full { len: 12, capacity: 12 }));
        let error = llm.decode_step(continuation, &mut cache).unwrap_err();
        assert!(error.to_string().contains("4 tokens a row in one decoding step"), "{error}");
        let branches = plan(vec![vec![Span::text(1), Span::text(1).on_branch(0)]], VisionAttention::Causal);
        let documents = plan(vec![vec![Span::text(1), Span::text(1).in_document(1)]], VisionAttention::Causal);
        for plan in [branches, documents] {
            let mut cache = llm.new_cache(1, 4).unwrap();
            let error =
                llm.prefill(&llm.embed(&prompts.narrow(0, 0, 1).narrow(1, 0, 2)), &plan, &mut cache).unwrap_err();
            assert!(error.to_string().contains("several documents or branches"), "{error}");
            assert_eq!(cache.lens(), [0]);
        }
    }

    /// Greedy tokens after an image, each from the whole sequence anew and each from the cache.
    #[test]
    fn same_tokens_with_and_without_cache() {
        let llm = CausalLm::load(&LlmConfig::tiny(64), &Weights::random(3, Device::Cpu, Kind::Float)).unwrap();
        let random = fixtures::Random::new(3);
        for mode in [VisionAttention::Bidirectional, VisionAttention::Causal] {
            let row = vec![Span::text(2), Span::image(2, 2), Span::text(3)];
            let embeds = random.normal([1, 9, 32]);
            let mut cache = llm.new_cache(1, 20).unwrap();
            let mut logits = llm.prefill(&embeds, &plan(vec![row.clone()], mode), &mut cache).unwrap();
            let mut whole = embeds;
            for new in 0..8 {
                let mut row = row.clone();
                row.push(Span::text(new));
                row.retain(|span| !span.is_empty());
                let output = llm.decoder().forward(&whole, &plan(vec![row], mode), 0);
                let without = llm.logits(&output.last_hidden_state.select(1, -1));
                fixtures::assert_close_to(&logits, &without, 1e-5);
                let token = without.argmax(-1, true); // [1, 1]
                assert!(token.equal(&logits.argmax(-1, true)));
                whole = Tensor::cat(&[&whole, &llm.embed(&token)], 1);
                logits = llm.decode_step(&token, &mut cache).unwrap();
            }
        }
    }

    /// Chunks into scattered pages, and steps of several such sequences, against whole prompts in a cache of rows.
    #[test]
    fn pages_change_no_logits() {
        let golden = fixtures::open("llama");
        for (window, kind) in [(None, Kind::Float), (Some(6), Kind::Float), (None, Kind::Double)] {
            let config = LlmConfig { sliding_window: window, ..LlmConfig::tiny(64) };
            let config =
                LlmConfig { model_type: if window.is_some() { "mistral" } else { "llama" }.to_owned(), ..config };
            let weights = Weights::from_tensors(golden.under("weights."), Device::Cpu, kind);
            let llm = CausalLm::load(&config, &weights).unwrap();
            let rows = [
                vec![Span::text(2), Span::image(2, 2), Span::text(5)],
                vec![Span::image(1, 3), Span::text(1)],
                vec![Span::text(13)],
            ];
            let ids = |row: usize, len: i64| -> Vec<i64> { (0..len).map(|i| (7 * i + 11 * row as i64) % 64).collect() };
            let new_ids = |step: i64| -> Vec<i64> { (0..3).map(|row| (5 * step + row) % 64).collect() };
            let of = |row: Vec<Span>| {
                AttentionPlan::new(&Spans::new(vec![row]), VisionAttention::Bidirectional, Device::Cpu, kind).unwrap()
            };
            let mut expected = Vec::new();
            for (i, row) in rows.iter().enumerate() {
                let plan = of(row.clone());
                let len = plan.row_lens()[0];
                let mut cache = llm.new_cache(1, len + 3).unwrap();
                let embeds = llm.embed(&Tensor::from_slice(&ids(i, len)).unsqueeze(0));
                let mut logits = vec![llm.prefill(&embeds, &plan, &mut cache).unwrap()];
                for step in 0..3 {
                    let id = Tensor::from_slice(&new_ids(step)[i..=i]).unsqueeze(0);
                    logits.push(llm.decode_step(&id, &mut cache).unwrap());
                }
                expected.push(logits);
            }
            // Pages of three tokens, handed out from the last one on.
            let mut cache = KvPages::new(&config, 20, 3, Device::Cpu, kind).unwrap();
            assert_eq!(KvPages::page_bytes(&config, 3, kind) * 20, {
                let (keys, values) = cache.layer(0);
                2 * (keys.numel() + values.numel()) * kind.elt_size_in_bytes()
            });
            let tables: Vec<Vec<i32>> = vec![(13..18).rev().collect(), vec![19, 18, 12], (0..6).collect()];
            for (i, row) in rows.iter().enumerate() {
                let plan = of(row.clone());
                let len = plan.row_lens()[0];
                let embeds = llm.embed(&Tensor::from_slice(&ids(i, len)).unsqueeze(0));
                let (mut start, mut logits) = (0, None);
                while start < len {
                    let end = plan.whole_blocks((start + 4).min(len));
                    let part = PagedRow { pages: &tables[i], len: start, adapter: LoraId::OWN };
                    let embeds = embeds.narrow(1, start, end - start);
                    let found = llm.prefill_pages(&embeds, &plan.part(start..end).unwrap(), &part, &mut cache).unwrap();
                    (start, logits) = (end, Some(found));
                }
                fixtures::assert_close_to(&logits.unwrap(), &expected[i][0], 1e-5);
            }
            for step in 0..3 {
                let row = |i: usize| {
                    let len: i64 = rows[i].iter().map(Span::len).sum();
                    PagedRow { pages: &tables[i], len: len + step, adapter: LoraId::OWN }
                };
                let rows = [row(0), row(1), row(2)];
                let logits = llm.decode_pages(&new_ids(step), &rows, &mut cache).unwrap(); // [3, vocab]
                for (i, expected) in expected.iter().enumerate() {
                    let expected = &expected[step as usize + 1];
                    fixtures::assert_close_to(&logits.get(i as i64).unsqueeze(0), expected, 1e-5);
                }
            }
            let short = PagedRow { pages: &tables[1], len: 9, adapter: LoraId::OWN };
            let error = llm.decode_pages(&[1], &[short], &mut cache).unwrap_err().to_string();
            assert_eq!(error, "row 0 has pages for 9 tokens and is to hold 10");
            let unknown = PagedRow { pages: &[20], len: 0, adapter: LoraId::OWN };
            assert!(llm.decode_pages(&[1], &[unknown], &mut cache).is_err());
        }
    }
}
