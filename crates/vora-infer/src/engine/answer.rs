//! One request while it is answered: what of it is in the cache, and what was said so far.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use tch::Tensor;
use vora_llm::{AttentionPlan, KvPages, PagedRow, VisionAttention};
use vora_lora::ActsOn;
use vora_model::{ImageWriter, Input, VisionLanguageModel};
use vora_text::{Span, Spans, TokenStream, Tokenizer};
use vora_torch::nn::decode::LoraId;

use super::event::{Event, TokenLogprob};
use super::job::OnEvent;
use super::loaded::{Chosen, Loaded};
use super::logprobs::logprob;
use super::pool::Pool;
use super::prefix::{AdapterKey, Keys, PageKey, TokenKey};
use super::steps::Steps;
use super::stop::StopStrings;
use crate::prompter::Prompt;
use crate::sequence::Sequence;
use crate::{FinishReason, InferError, OutputModality, Request};

/// One request while it is answered.
pub(super) struct Answer<'a> {
    model: &'a dyn VisionLanguageModel, // what its pictures are seen by
    input: Input,
    plan: AttentionPlan,
    adapter: LoraId, // that acts on what is generated
    pages: Vec<i32>,
    held: i64, // tokens whose keys and values are in the pages
    sequence: Sequence<'a>,
    stream: TokenStream<'a>,
    stop: StopStrings,
    tokenizer: &'a Tokenizer,
    writer: Option<&'a dyn ImageWriter>, // of an answer that may have pictures
    picture: Vec<i64>,                   // tokens so far of the one that it is in
    logprobs: Option<usize>,
    naming: Option<Naming<'a>>, // where pages are found again by what they hold
    cancelled: Arc<AtomicBool>,
    on_event: OnEvent,
}

/// What the pages of a sequence are found by.
struct Naming<'a> {
    keys: &'a Keys,
    adapter: AdapterKey,
    tokens: Vec<TokenKey>, // of the prompt
    prompt: Vec<PageKey>,  // of its full pages
    page_len: usize,
}

impl fmt::Debug for Answer<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Answer").field("pages", &self.pages).field("held", &self.held).finish_non_exhaustive()
    }
}

impl<'a> Answer<'a> {
    /// Checks the request against the model; `page_len` is given where its pages are to be found again.
    ///
    /// # Errors
    /// [`InferError`](crate::InferError), and where pictures and places differ in number.
    pub(super) fn new(
        loaded: &Loaded<'a>,
        mut prompt: Prompt,
        request: &Request<'static>,
        page_len: Option<usize>,
    ) -> Result<Self> {
        let Chosen { model, prompter, id, acts_on } = loaded.chosen(&request.adapter)?;
        let input = prompt.input(model)?;
        let context = model.llm().config().max_position_embeddings;
        let wanted = [(&request.sampling, request.max_new_tokens)];
        let constraint = loaded.constraints.into_iter().flatten().find(|c| c.modality() == request.modality);
        ensure!(constraint.is_some() || request.modality == OutputModality::Text, InferError::WritesNoPictures);
        let sequence =
            Sequence::of_rows(&input, context, constraint, &wanted)?.pop().context("a row became nothing")?;
        let sequence = sequence.with_grammar(prompt.grammar.take());
        let plan = model.plan(&input.spans)?.with_adapters(acts_on).with_lora(id);
        let adapter = plan.adapted_rows().first().copied().unwrap_or_default();
        let naming = page_len.map(|page_len| {
            let ids = Vec::<i64>::try_from(input.input_ids.view([-1]))?;
            let fused = model.vision_attention() == VisionAttention::BidirectionalFused;
            let spans = input.spans.rows().first().map_or(&[][..], Vec::as_slice);
            let tokens = loaded.keys.tokens(&ids, spans, prompt.pictures(), fused);
            // Adapters that act on the picture's tokens alone act on what follows from the tokens.
            let by_tokens = id != LoraId::NONE && acts_on == ActsOn::ImageTokens;
            let adapter = if by_tokens { AdapterKey::Pictures(id) } else { AdapterKey::Whole(adapter) };
            let prompt = loaded.keys.pages(adapter, &tokens, page_len);
            anyhow::Ok(Naming { keys: loaded.keys, adapter, tokens, prompt, page_len })
        });
        Ok(Self {
            model,
            adapter,
            plan,
            input,
            pages: Vec::new(),
            held: 0,
            sequence,
            stream: prompter.tokenizer.stream(true),
            stop: StopStrings::new(&request.stop),
            tokenizer: &prompter.tokenizer,
            writer: model.image_writer().filter(|_| request.modality != OutputModality::Text),
            picture: Vec::new(),
            logprobs: request.top_logprobs,
            naming: naming.transpose()?,
            cancelled: Arc::default(),
            on_event: Box::new(|_| {}),
        })
    }

    /// The same with somebody who hears of it and may take it back.
    pub(super) fn told(self, cancelled: Arc<AtomicBool>, on_event: OnEvent) -> Self {
        Self { cancelled, on_event, ..self }
    }

    pub(super) fn tell(&mut self, event: Event) {
        (self.on_event)(event);
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    pub(super) fn prompt_len(&self) -> i64 {
        self.input.spans.seq()
    }

    pub(super) fn image_tokens(&self) -> i64 {
        self.input.spans.rows().iter().flatten().filter(|span| span.is_image()).map(Span::len).sum()
    }

    /// Tokens of prompt and answer at most.
    pub(super) fn most_tokens(&self) -> i64 {
        self.prompt_len() + self.sequence.max_new_tokens() as i64
    }

    pub(super) fn held(&self) -> i64 {
        self.held
    }

    pub(super) fn pages(&self) -> &[i32] {
        &self.pages
    }

    pub(super) fn completion_tokens(&self) -> usize {
        self.sequence.ids().len()
    }

    /// Pages for all that it may take, those of its beginning that are known among them; false where there are not enough.
    pub(super) fn take_pages(&mut self, pool: &mut Pool, page_len: i64) -> bool {
        // The prompt's last token is computed in any case, for what comes after it.
        let most = ((self.prompt_len() - 1) / page_len) as usize;
        let keys = self.naming.as_ref().map_or(&[][..], |naming| &naming.prompt);
        let known = pool.hold_known(&keys[..keys.len().min(most)]);
        let needed = ((self.most_tokens() + page_len - 1) / page_len) as usize;
        let Some(more) = pool.take(needed - known.len()) else {
            pool.release(&known);
            return false;
        };
        self.held = known.len() as i64 * page_len;
        self.pages = [known, more].concat();
        true
    }

    /// The next part of the prompt, of some `chunk` tokens; the logits after it `[1, vocab]` once it is the last.
    ///
    /// # Errors
    /// Where the pictures are none that the model can take.
    pub(super) fn prefill(
        &mut self,
        loaded: &Loaded<'_>,
        chunk: i64,
        steps: &mut Steps,
        cache: &mut KvPages,
    ) -> Result<Option<Tensor>> {
        let len = self.prompt_len();
        let end = self.plan.whole_blocks((self.held + chunk).min(len));
        let embeds = embed_part(self.model, &self.input, self.held, end)?;
        let plan = self.plan.part(self.held..end)?;
        let ends: Vec<i64> = (self.held..end).map(|place| self.plan.whole_blocks(place + 1)).collect();
        let logits = steps.prefill(loaded.model.llm(), &embeds, &plan, &ends, &self.row(), cache)?;
        self.held = end;
        Ok((end == len).then_some(logits))
    }

    /// Itself as a decoding step takes it.
    pub(super) fn row(&self) -> PagedRow<'_> {
        PagedRow { pages: &self.pages, len: self.held, adapter: self.adapter }
    }

    /// The token that goes through the decoder next.
    pub(super) fn last(&self) -> i64 {
        self.sequence.last()
    }

    /// Notes that its last token went through the decoder.
    pub(super) fn stepped(&mut self) {
        self.held += 1;
    }

    /// The adapter that acts on what it generates.
    pub(super) fn adapter(&self) -> LoraId {
        self.adapter
    }

    /// Chooses the next token by the logits of all tokens, and tells of the text; why it has ended, where it has.
    ///
    /// # Errors
    /// A token that cannot be decoded.
    pub(super) fn take_token(&mut self, logits: &mut [f32]) -> Result<Option<FinishReason>> {
        let raw = self.logprobs.map(|top| (top, logits.to_vec()));
        let token =
            if self.sequence.finish_reason().is_some() { None } else { self.sequence.step(logits, self.eos())? };
        let (mut text, mut tokens, mut stopped) = (String::new(), Vec::new(), false);
        if let Some(token) = token {
            if !self.is_of_picture(token)? {
                let new = self.stream.push(token)?.unwrap_or_default();
                (text, stopped) = self.stop.push(&new);
            }
            if let Some((top, raw)) = raw {
                tokens.push(self.logprob(token, top, &raw));
            }
        }
        let reason = if stopped { Some(FinishReason::Stop) } else { self.sequence.finish_reason() };
        if reason.is_some() && !stopped {
            let stream = std::mem::replace(&mut self.stream, self.tokenizer.stream(true));
            let (more, ended) = self.stop.push(&stream.finish()?);
            text.push_str(&more);
            if !ended {
                text.push_str(&self.stop.rest());
            }
        }
        if !text.is_empty() || !tokens.is_empty() {
            self.tell(Event::Text { text, tokens });
        }
        Ok(reason)
    }

    /// Whether the token is one of a picture's, which is told of with its last one.
    fn is_of_picture(&mut self, token: i64) -> Result<bool> {
        let Some(writer) = self.writer else { return Ok(false) };
        if writer.image_vocabulary().binary_search(&token).is_err() {
            return Ok([writer.begin_image_id(), writer.end_image_id()].contains(&token));
        }
        self.picture.push(token);
        let (rows, cols) = writer.drawn_grid();
        if self.picture.len() as i64 == rows * cols {
            let ids = Tensor::from_slice(&std::mem::take(&mut self.picture)).unsqueeze(0);
            for image in writer.draw(&ids)? {
                self.tell(Event::Image(image));
            }
        }
        Ok(true)
    }

    fn eos(&self) -> &'a [i64] {
        self.tokenizer.eos_ids()
    }

    fn logprob(&self, token: i64, top: usize, logits: &[f32]) -> TokenLogprob {
        let bytes = |id: i64| self.tokenizer.token_bytes(id);
        let (logprob, top) = logprob(logits, token, top);
        let top = top.into_iter().map(|(id, logprob)| (id, bytes(id), logprob)).collect();
        TokenLogprob { id: token, bytes: bytes(token), logprob, top }
    }

    /// Lets others find the pages that are full by now.
    pub(super) fn name_pages(&self, pool: &mut Pool) {
        let Some(naming) = &self.naming else { return };
        let keys = naming.of_first(self.held as usize, self.sequence.ids());
        for (&page, key) in self.pages.iter().zip(keys) {
            pool.name(page, key);
        }
    }
}

impl Naming<'_> {
    /// The keys of the full pages of the first `len` tokens of the prompt and of `ids`, which follow it.
    fn of_first(&self, len: usize, ids: &[i64]) -> Vec<PageKey> {
        let mut tokens = self.tokens.clone();
        tokens.extend(ids.iter().map(|&id| TokenKey::Word(id)));
        tokens.truncate(len);
        self.keys.pages(self.adapter, &tokens, self.page_len)
    }
}

/// The embeddings `[1, end - start, hidden]` of a part of the only row; pictures that lie outside it are not looked at.
fn embed_part(model: &dyn VisionLanguageModel, input: &Input, start: i64, end: i64) -> Result<Tensor> {
    let (mut place, mut picture) = (0, 0);
    let (mut first, mut spans, mut pictures) = (None, Vec::new(), Vec::new());
    for span in input.spans.rows().iter().flatten() {
        let next = place + span.len();
        if next > start && place < end {
            // Of a picture all is needed, of a text the part.
            let (from, to) = if span.is_image() { (place, next) } else { (place.max(start), next.min(end)) };
            first.get_or_insert(from);
            spans.push(if span.is_image() { *span } else { Span::text(to - from) });
            if span.is_image() {
                pictures.push(input.pixel_values[picture].shallow_clone());
            }
        }
        picture += usize::from(span.is_image());
        place = next;
    }
    let first = first.unwrap_or(start);
    let len: i64 = spans.iter().map(Span::len).sum();
    let ids = input.input_ids.narrow(1, first, len);
    let embeds = model.embed(&Input::new(ids, pictures, Spans::new(vec![spans])))?;
    Ok(embeds.narrow(1, start - first, end - start))
}
