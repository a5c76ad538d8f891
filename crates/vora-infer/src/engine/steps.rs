//! Who computes a token of every answer: our own kernels where they serve the model, libtorch elsewhere.

use anyhow::{Result, ensure};
use tch::Tensor;
use vora_llm::{AttentionPlan, CausalLm, KvPages, PackedDecoder, PackedStep, PagedRow};
use vora_torch::nn::decode::{LoraId, Pages, Width};

/// Who computes decoding steps.
#[derive(Debug)]
pub(super) enum Steps {
    /// One call of our own.
    Packed(Box<PackedDecoder>, Pages),
    /// libtorch's operators.
    Plain,
}

impl Steps {
    /// For this model over that cache, whose tensors are shared.
    ///
    /// # Errors
    /// Where weights are to be read in a width that only our own kernels have, and those do not serve the model.
    pub(super) fn new(llm: &CausalLm, width: Option<Width>, cache: &KvPages) -> Result<Self> {
        let own = llm.width();
        let packed = match width {
            Some(width) if own.is_some() => PackedDecoder::new(llm, width)?,
            Some(_) => None,
            None => PackedDecoder::as_stored(llm)?,
        };
        let Some(packed) = packed else {
            ensure!(
                width.is_none() || width == own,
                "a {} in {:?} on {:?}, or one with DoRA's magnitudes, is not read in another width",
                llm.config().model_type,
                llm.kind(),
                llm.device()
            );
            return Ok(Self::Plain);
        };
        Ok(Self::Packed(Box::new(packed), cache.packed()?))
    }

    /// A part of a prompt: the embeddings `[1, part, hidden]` of what `plan` is of, which goes on where `row` ends -> logits of the
    /// last token `[1, vocab]`. `ends` says for each token how many of the prompt's it attends to.
    ///
    /// # Errors
    /// Where a page is missing.
    pub(super) fn prefill(
        &mut self,
        llm: &CausalLm,
        inputs_embeds: &Tensor,
        plan: &AttentionPlan,
        ends: &[i64],
        row: &PagedRow<'_>,
        cache: &mut KvPages,
    ) -> Result<Tensor> {
        let Self::Packed(packed, pages) = self else { return llm.prefill_pages(inputs_embeds, plan, row, cache) };
        let places: Vec<i64> = (row.len..).take(ends.len()).collect();
        let adapters = plan.adapters().by_token(ends.len())?;
        let seq_lens = vec![places.last().map_or(0, |last| last + 1); ends.len()];
        let step = PackedStep {
            tables: &row.pages.repeat(ends.len()),
            lens: &places,
            ends,
            position_ids: &places,
            seq_lens: &seq_lens,
            adapters: &adapters,
            asked: &[ends.len() as i64 - 1],
        };
        packed.forward(&inputs_embeds.squeeze_dim(0), pages, &step)
    }

    /// One token more for every row: logits `[rows, vocab]`.
    ///
    /// # Errors
    /// Where a row has no page for it.
    pub(super) fn step(
        &mut self,
        llm: &CausalLm,
        ids: &[i64],
        rows: &[PagedRow<'_>],
        cache: &mut KvPages,
    ) -> Result<Tensor> {
        let Self::Packed(packed, pages) = self else { return llm.decode_pages(ids, rows, cache) };
        let most = rows.iter().map(|row| row.pages.len()).max().unwrap_or(0);
        let mut tables = Vec::with_capacity(rows.len() * most);
        for (row, end) in rows.iter().zip(1..) {
            tables.extend_from_slice(row.pages);
            tables.resize(end * most, 0); // beyond a row's tokens, where nothing is read
        }
        let (lens, adapters): (Vec<i64>, Vec<LoraId>) = rows.iter().map(|row| (row.len, row.adapter)).unzip();
        let step = PackedStep {
            tables: &tables,
            lens: &lens,
            position_ids: &lens,
            adapters: &adapters,
            ..PackedStep::default()
        };
        packed.decode_step(ids, pages, &step)
    }
}
