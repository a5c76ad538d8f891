//! The engine as its callers see it: requests in, events out.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use anyhow::Result;
use vora_text::Tokenizer;

use super::config::EngineConfig;
use super::event::Event;
use super::job::Job;
use super::scheduler::Scheduler;
use super::stats::{Counts, EngineStats};
use crate::adapters::NamedAdapter;
use crate::error::InferError;
use crate::prompter::Prompter;
use crate::request::AdapterChoice;
use crate::{Assistant, Request};

/// A model that answers many requests at once, on a thread of its own. It is shared by whoever asks. Dropped, it takes all requests
/// back and waits for that thread: none may be in libtorch when a program ends.
#[derive(Debug)]
pub struct Engine {
    prompter: Arc<Prompter>,
    named: Vec<(String, Arc<Prompter>)>, // by the names of adapters
    jobs: Mutex<Option<Sender<Job>>>,    // none once it is ending
    counts: Arc<Counts>,
    config: EngineConfig,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// A request that was taken; dropped, it takes the request back, wherever it is.
#[derive(Debug)]
pub struct Ticket {
    cancelled: Arc<AtomicBool>,
}

impl Engine {
    /// Starts the thread that answers.
    ///
    /// # Errors
    /// Limits out of their ranges, and where there is no memory for the cache of keys and values.
    pub fn start(assistant: Assistant, config: EngineConfig) -> Result<Self> {
        config.validate()?;
        let Assistant { model, prompter, generation: _, adapters } = assistant;
        let prompter = Arc::new(prompter);
        let own = |adapter: &NamedAdapter| adapter.eyes.as_ref().map_or(&prompter, |eyes| &eyes.prompter).clone();
        let named = adapters.iter().map(|adapter| (adapter.name.clone(), own(adapter))).collect();
        let (jobs, of_jobs) = mpsc::channel();
        let counts = Arc::new(Counts::default());
        let scheduler = Scheduler::new(model, prompter.clone(), adapters, config.clone(), counts.clone())?;
        let thread = std::thread::Builder::new().name("vora-engine".to_owned());
        let thread = thread.spawn(move || scheduler.run(&of_jobs))?;
        Ok(Self { prompter, named, jobs: Mutex::new(Some(jobs)), counts, config, thread: Mutex::new(Some(thread)) })
    }

    /// Takes a request; `on_event` is called on the engine's thread with what becomes of it, and should return at once. The last
    /// event is [`Event::Finished`] or [`Event::Failed`], unless the ticket is dropped before.
    ///
    /// Conversation and pictures are prepared by the caller's thread.
    ///
    /// # Errors
    /// [`InferError::QueueFull`], [`InferError::Ending`], [`InferError::UnknownAdapter`], [`InferError::SeesNoPictures`],
    /// [`InferError::BadImage`], [`InferError::BadSchema`], [`InferError::BadMessages`], and sampling rules out of their ranges. What else may be wrong
    /// with the request is known only when it meets the model: [`Event::Failed`] comes in place of [`Event::Started`] then.
    pub fn submit(&self, request: Request<'static>, on_event: impl FnMut(Event) + Send + 'static) -> Result<Ticket> {
        let waiting = self.counts.waiting.fetch_add(1, Ordering::Relaxed);
        let job = (waiting < self.config.max_waiting as u64)
            .then_some(())
            .ok_or_else(|| InferError::QueueFull { waiting: waiting as usize }.into())
            .and_then(|()| {
                request.sampling.validate()?;
                self.prompter_of(&request)?.prompt(&request)
            });
        // A request that waits holds its pictures as the model takes them, and no longer as they came.
        let request = Request { images: Vec::new().into(), ..request };
        let sent = job.and_then(|prompt| {
            let cancelled = Arc::new(AtomicBool::new(false));
            let job = Job { prompt, request, cancelled: cancelled.clone(), on_event: Box::new(on_event) };
            let jobs = self.jobs.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            jobs.as_ref().and_then(|jobs| jobs.send(job).ok()).ok_or(InferError::Ending)?;
            Ok(Ticket { cancelled })
        });
        if sent.is_err() {
            self.counts.waiting.fetch_sub(1, Ordering::Relaxed);
        }
        sent
    }

    /// Takes a request; its events come one after the other. Dropped, the iterator takes the request back.
    ///
    /// # Errors
    /// As [`submit`](Self::submit).
    pub fn stream(&self, request: Request<'static>) -> Result<impl Iterator<Item = Event> + use<>> {
        let (events, of_events) = mpsc::channel();
        let ticket = self.submit(request, move |event| drop(events.send(event)))?;
        Ok(of_events.into_iter().inspect(move |_| {
            let _held = &ticket;
        }))
    }

    /// What makes a prompt of it.
    fn prompter_of(&self, request: &Request<'_>) -> Result<&Prompter, InferError> {
        let AdapterChoice::Named(name) = &request.adapter else { return Ok(&self.prompter) };
        let found = self.named.iter().find(|(known, _)| known == name).map(|(_, prompter)| &**prompter);
        let known = || self.named.iter().map(|(name, _)| name.clone()).collect();
        found.ok_or_else(|| InferError::UnknownAdapter { name: name.clone(), known: known() })
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.prompter.tokenizer
    }

    /// Its limits.
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// How much it has done and has to do.
    pub fn stats(&self) -> EngineStats {
        self.counts.stats()
    }

    #[cfg(test)]
    pub(super) fn counts(&self) -> Arc<Counts> {
        self.counts.clone()
    }

    /// Takes no more requests, and ends those that it has taken with [`InferError::Ending`].
    pub fn give_up(&self) {
        drop(self.jobs.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take());
        self.counts.ending.store(true, Ordering::Relaxed);
    }

    /// Takes no more requests, answers those that it has taken, and returns when that is done.
    pub fn finish(&self) {
        let lock = |mutex: &Mutex<Option<JoinHandle<()>>>| mutex.lock().unwrap_or_else(|p| p.into_inner()).take();
        drop(self.jobs.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take());
        if let Some(thread) = lock(&self.thread) {
            let _ = thread.join(); // what it panicked of, it told its requests
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.give_up();
        self.finish();
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }
}
