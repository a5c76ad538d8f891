//! The engine's thread: which request goes through the decoder next.

use std::any::Any;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError};

use anyhow::{Context, Result, anyhow, ensure};
use tch::{Kind, Tensor};
use vora_llm::KvPages;
use vora_model::VisionLanguageModel;
use vora_torch::checkpoint::forget_files;
use vora_torch::nn::decode::Width;
use vora_torch::runtime::{available_memory, release_freed};
use vora_torch::weights::Quantization;

use super::answer::Answer;
use super::config::EngineConfig;
use super::event::Event;
use super::job::{Job, OnEvent};
use super::loaded::Loaded;
use super::pool::Pool;
use super::prefix::Keys;
use super::stats::Counts;
use super::steps::Steps;
use crate::adapters::NamedAdapter;
use crate::error::InferError;
use crate::finite::blamed;
use crate::prompter::Prompter;
use crate::{Constraint, FinishReason, OutputModality};

/// Tokens of a page: few, so that little is lost where prompts part and at an answer's end.
const PAGE_LEN: i64 = 16;

/// The model, the cache, and the requests that are answered from them.
#[derive(Debug)]
pub(super) struct Scheduler {
    model: Box<dyn VisionLanguageModel>,
    prompter: Arc<Prompter>,
    named: Vec<NamedAdapter>,
    config: EngineConfig,
    counts: Arc<Counts>,
    cache: KvPages,
    steps: Steps,
    pool: Pool,
    keys: Keys,
}

impl Scheduler {
    /// Takes the memory for keys and values.
    ///
    /// # Errors
    /// Where there is not as much.
    pub(super) fn new(
        mut model: Box<dyn VisionLanguageModel>,
        prompter: Arc<Prompter>,
        named: Vec<NamedAdapter>,
        config: EngineConfig,
        counts: Arc<Counts>,
    ) -> Result<Self> {
        if let Some(quantization) = config.width.and_then(Quantization::of_width) {
            model.adapted_mut().quantize(quantization)?;
        }
        let has_few_bits = model.llm().width().is_some_and(Width::is_quantised);
        if has_few_bits {
            model.llm_mut().narrow_words();
        }
        let llm = model.llm();
        let page_bytes = KvPages::page_bytes(llm.config(), PAGE_LEN, llm.kind());
        let pages = i32::try_from(config.cache_bytes / page_bytes.max(1)).unwrap_or(i32::MAX);
        ensure!(
            pages > 0,
            "cache_bytes is {}, and {PAGE_LEN} tokens of keys and values take {page_bytes}",
            config.cache_bytes
        );
        let room = available_memory(llm.device()).unwrap_or(u64::MAX);
        ensure!(
            config.cache_bytes as u64 <= room,
            "cache_bytes is {}, and {room} bytes of memory are left",
            config.cache_bytes
        );
        let cache = KvPages::new(llm.config(), i64::from(pages), PAGE_LEN, llm.device(), llm.kind())
            .with_context(|| format!("no memory for {pages} pages of {page_bytes} bytes for keys and values"))?;
        let steps = Steps::new(llm, config.width, &cache)?;
        if has_few_bits {
            forget_files(); // blocks lie in memory of their own
        }
        release_freed();
        counts.cache_pages.store(pages as u64, Ordering::Relaxed);
        let (pool, keys) = (Pool::new(pages), Keys::default());
        Ok(Self { model, prompter, named, config, counts, cache, steps, pool, keys })
    }

    /// Answers requests until there are none and none can come.
    pub(super) fn run(self, jobs: &Receiver<Job>) {
        let Self { model, prompter, named, config, counts, cache, steps, pool, keys } = self;
        let constraints = model.image_writer().map(|writer| {
            [OutputModality::Text, OutputModality::Image, OutputModality::Interleaved]
                .map(|m| Constraint::new(m, writer))
        });
        let loaded = Loaded {
            model: &*model,
            prompter: &prompter,
            constraints: constraints.as_ref().map(<[_; 3]>::as_slice),
            keys: &keys,
            named: &named,
        };
        let queue = Queue { waiting: VecDeque::new(), next: None, prefilling: None, decoding: Vec::new(), open: true };
        let mut turn = Turn { loaded, config: &config, counts: &counts, cache, steps, pool, queue };
        while turn.receive(jobs) {
            turn.admit();
            turn.prefill();
            turn.decode();
        }
    }
}

/// Requests by what is next for them.
struct Queue<'a> {
    waiting: VecDeque<Job>,
    next: Option<Answer<'a>>, // prepared, and without pages yet
    prefilling: Option<Answer<'a>>,
    decoding: Vec<Answer<'a>>,
    open: bool, // whether more may come
}

/// One turn after the other: a part of a prompt, then a token of every answer.
struct Turn<'a> {
    loaded: Loaded<'a>,
    config: &'a EngineConfig,
    counts: &'a Counts,
    cache: KvPages,
    steps: Steps,
    pool: Pool,
    queue: Queue<'a>,
}

impl<'a> Turn<'a> {
    /// Takes what was submitted and leaves what was taken back; waits where there is nothing else to do. False once there is
    /// nothing, and nothing can come.
    fn receive(&mut self, jobs: &Receiver<Job>) -> bool {
        loop {
            loop {
                match jobs.try_recv() {
                    Ok(job) => self.queue.waiting.push_back(job),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => {
                        self.queue.open = false;
                        break;
                    }
                }
            }
            self.drop_cancelled();
            if !self.queue.is_empty() {
                return true;
            }
            match jobs.recv() {
                Ok(job) => self.queue.waiting.push_back(job),
                Err(_) => return false,
            }
        }
    }

    fn drop_cancelled(&mut self) {
        let before = self.queue.waiting.len();
        let all = self.counts.ending.load(Ordering::Relaxed);
        self.queue.waiting.retain_mut(|job| {
            let is_cancelled = job.cancelled.load(Ordering::Relaxed);
            if all && !is_cancelled {
                (job.on_event)(Event::Failed(InferError::Ending.into()));
            }
            !all && !is_cancelled
        });
        let gone = (before - self.queue.waiting.len()) as u64;
        self.counts.waiting.fetch_sub(gone, Ordering::Relaxed);
        self.counts.ended.fetch_add(gone, Ordering::Relaxed);
        self.counts.cancelled.fetch_add(gone, Ordering::Relaxed);
        for place in [&mut self.queue.next, &mut self.queue.prefilling] {
            if let Some(answer) = place.take_if(|answer| all || answer.is_cancelled()) {
                let ending = given_up(&answer);
                end(answer, ending, &mut self.pool, self.counts, self.config);
            }
        }
        for answer in self.queue.decoding.extract_if(.., |answer| all || answer.is_cancelled()) {
            let ending = given_up(&answer);
            end(answer, ending, &mut self.pool, self.counts, self.config);
        }
    }

    /// Gives the next request pages, where there are enough for all that it may take.
    fn admit(&mut self) {
        while self.queue.prefilling.is_none() && self.queue.decoding.len() < self.config.max_batch {
            if self.queue.next.is_none() {
                let Some(job) = self.queue.waiting.pop_front() else { return };
                self.counts.waiting.fetch_sub(1, Ordering::Relaxed);
                self.counts.running.fetch_add(1, Ordering::Relaxed);
                match self.prepare(job) {
                    Ok(answer) => self.queue.next = Some(answer),
                    Err((error, mut on_event)) => {
                        count_end(self.counts, Some(&self.counts.failed));
                        on_event(Event::Failed(error));
                        continue;
                    }
                }
            }
            let Some(mut answer) = self.queue.next.take() else { return };
            if !answer.take_pages(&mut self.pool, PAGE_LEN) {
                self.queue.next = Some(answer);
                return;
            }
            self.counts.prompt_tokens.fetch_add(answer.prompt_len() as u64, Ordering::Relaxed);
            self.counts.cached_tokens.fetch_add(answer.held() as u64, Ordering::Relaxed);
            answer.tell(Event::Started {
                prompt_tokens: answer.prompt_len() as usize,
                cached_tokens: answer.held() as usize,
                image_tokens: answer.image_tokens() as usize,
            });
            self.queue.prefilling = Some(answer);
        }
        self.counts.used_pages.store(self.pool.used() as u64, Ordering::Relaxed);
    }

    /// A request as the decoder takes it, or why it cannot, and to whom that is told.
    fn prepare(&self, job: Job) -> Result<Answer<'a>, (anyhow::Error, OnEvent)> {
        let Job { prompt, request, cancelled, on_event } = job;
        let (loaded, config) = (self.loaded, self.config);
        let room = self.cache.pages() * PAGE_LEN;
        let answer = guarded(|| {
            let keys = config.prefix_caching.then_some(PAGE_LEN as usize);
            let answer = Answer::new(&loaded, prompt, &request, keys)?;
            let needed = answer.most_tokens();
            ensure!(needed <= room, InferError::ContextFull { needed, room });
            Ok(answer)
        });
        match answer {
            Ok(answer) => Ok(answer.told(cancelled, on_event)),
            Err(error) => Err((error, on_event)),
        }
    }

    /// A part of the prompt that is being computed; with its last one, the first token.
    fn prefill(&mut self) {
        let Some(mut answer) = self.queue.prefilling.take() else { return };
        let (loaded, steps, cache) = (&self.loaded, &mut self.steps, &mut self.cache);
        let chunk = self.config.prefill_chunk;
        let logits = guarded(|| tch::no_grad(|| answer.prefill(loaded, chunk, steps, cache)));
        match logits {
            Ok(None) => self.queue.prefilling = Some(answer),
            Ok(Some(logits)) => {
                answer.name_pages(&mut self.pool);
                self.take_tokens(vec![answer], &logits);
            }
            Err(error) => end(answer, Ending::Failed(error), &mut self.pool, self.counts, self.config),
        }
    }

    /// One more token of every answer.
    fn decode(&mut self) {
        let mut answers = std::mem::take(&mut self.queue.decoding);
        if answers.is_empty() {
            return;
        }
        answers.sort_by_key(Answer::adapter); // rows of one adapter are multiplied together
        let (ids, rows): (Vec<i64>, Vec<_>) = answers.iter().map(|answer| (answer.last(), answer.row())).unzip();
        let logits = guarded(|| self.steps.step(self.loaded.model.llm(), &ids, &rows, &mut self.cache));
        match logits {
            Ok(logits) => {
                answers.iter_mut().for_each(Answer::stepped);
                self.take_tokens(answers, &logits);
            }
            Err(error) => self.fail(answers, &error),
        }
    }

    /// Ends answers that one error is the end of.
    fn fail(&mut self, answers: Vec<Answer<'a>>, error: &anyhow::Error) {
        for answer in answers {
            end(answer, Ending::Failed(anyhow!("{error:#}")), &mut self.pool, self.counts, self.config);
        }
    }

    /// Lets each answer choose its next token by its row of logits `[answers, vocab]`.
    fn take_tokens(&mut self, answers: Vec<Answer<'a>>, logits: &Tensor) {
        let numbers = guarded(|| Ok(Vec::<f32>::try_from(logits.to_kind(Kind::Float).contiguous().view([-1]))?));
        let mut numbers = match numbers {
            Ok(numbers) => numbers,
            Err(error) => return self.fail(answers, &error),
        };
        let vocab = (numbers.len() / answers.len()).max(1);
        for (mut answer, logits) in answers.into_iter().zip(numbers.chunks_mut(vocab)) {
            let taken = guarded(|| answer.take_token(logits));
            let taken = taken.map_err(|error| blamed(error, &*self.loaded.model));
            self.counts.generated_tokens.fetch_add(1, Ordering::Relaxed);
            match taken {
                Ok(None) => self.queue.decoding.push(answer),
                Ok(Some(reason)) => end(answer, Ending::Finished(reason), &mut self.pool, self.counts, self.config),
                Err(error) => end(answer, Ending::Failed(error), &mut self.pool, self.counts, self.config),
            }
        }
    }
}

impl Queue<'_> {
    fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.next.is_none() && self.prefilling.is_none() && self.decoding.is_empty()
    }
}

/// How a request ends.
enum Ending {
    Finished(FinishReason),
    Failed(anyhow::Error),
    Cancelled,
}

/// How an answer ends that is not to be gone on with: taken back, or given up with the engine.
fn given_up(answer: &Answer<'_>) -> Ending {
    if answer.is_cancelled() { Ending::Cancelled } else { Ending::Failed(InferError::Ending.into()) }
}

/// Lets go of an answer's pages and says its last word.
fn end(mut answer: Answer<'_>, ending: Ending, pool: &mut Pool, counts: &Counts, config: &EngineConfig) {
    if config.prefix_caching && matches!(ending, Ending::Finished(_)) {
        answer.name_pages(pool);
    }
    pool.release(answer.pages());
    counts.used_pages.store(pool.used() as u64, Ordering::Relaxed);
    match ending {
        Ending::Finished(reason) => {
            count_end(counts, None);
            let completion_tokens = answer.completion_tokens();
            answer.tell(Event::Finished { reason, completion_tokens });
        }
        Ending::Failed(error) => {
            count_end(counts, Some(&counts.failed));
            answer.tell(Event::Failed(error));
        }
        Ending::Cancelled => count_end(counts, Some(&counts.cancelled)),
    }
}

fn count_end(counts: &Counts, kind: Option<&AtomicU64>) {
    counts.running.fetch_sub(1, Ordering::Relaxed);
    counts.ended.fetch_add(1, Ordering::Relaxed);
    kind.inspect(|count| {
        count.fetch_add(1, Ordering::Relaxed);
    });
}

/// What `run` makes; what libtorch throws where no error is returned ends the request and not the engine.
fn guarded<T>(run: impl FnOnce() -> Result<T>) -> Result<T> {
    let message = |panic: Box<dyn Any + Send>| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        anyhow!("{}", text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("the model failed"))
    };
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| Err(message(panic)))
}
