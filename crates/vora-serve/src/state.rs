//! What all connections share: the model once it is loaded, limits, counters, and whether the server is ending.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use hyper::header::HeaderValue;
use tokio::sync::Semaphore;
use vora_infer::{Engine, SamplingParams};

use crate::config::ServeConfig;
use crate::error::ApiError;
use crate::fetch::Fetcher;
use crate::guard::Keys;
use crate::metrics::Metrics;
use crate::page;
use crate::places::Places;
use crate::served::Served;

/// Requests whose pictures are decoded at once; what decoding takes is bounded by it.
const DECODING: usize = 2;
/// Pictures that are fetched at once.
const FETCHING: usize = 4;
/// KiB of bodies that are held at once.
const BODIES: usize = 256 << 10;

/// What all connections share.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) config: ServeConfig,
    pub(crate) keys: Keys,
    pub(crate) here: bool, // it listens on this machine alone and asks for no key
    pub(crate) fetcher: Fetcher,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) decoding: Arc<Semaphore>,
    pub(crate) fetching: Arc<Semaphore>,
    pub(crate) bodies: Arc<Semaphore>,
    pub(crate) places: Arc<Places>,
    pub(crate) started: u64,
    pub(crate) page_policy: HeaderValue,
    loaded: OnceLock<Arc<Loaded>>,
    draining: AtomicBool,
    in_flight: Arc<AtomicUsize>,
}

/// A model that answers.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) engine: Engine,
    /// By which names it is asked.
    pub(crate) models: Vec<Served>,
    /// Tokens of prompt and answer.
    pub(crate) context: i64,
    /// How answers are written where a request does not say.
    pub(crate) sampling: SamplingParams,
    /// Bytes of text that could be that many tokens.
    pub(crate) most_text: usize,
}

/// Counts a request while it lives.
#[derive(Debug)]
pub(crate) struct InFlight(Arc<AtomicUsize>);

impl State {
    pub(crate) fn new(config: ServeConfig, here: bool) -> Self {
        Self {
            keys: Keys::new(&config.api_keys),
            here: here && config.api_keys.is_empty(),
            fetcher: Fetcher::new(&config.image_hosts),
            metrics: Arc::default(),
            decoding: Arc::new(Semaphore::new(DECODING)),
            fetching: Arc::new(Semaphore::new(FETCHING)),
            bodies: Arc::new(Semaphore::new(BODIES)),
            places: Places::new(config.max_connections),
            started: now(),
            page_policy: HeaderValue::try_from(page::policy())
                .unwrap_or(HeaderValue::from_static("default-src 'none'")),
            config,
            loaded: OnceLock::new(),
            draining: AtomicBool::new(false),
            in_flight: Arc::default(),
        }
    }

    pub(crate) fn set_loaded(&self, loaded: Loaded) {
        let _ = self.loaded.set(Arc::new(loaded)); // the first stays
    }

    /// The model.
    ///
    /// # Errors
    /// 503 before it is loaded.
    pub(crate) fn loaded(&self) -> Result<Arc<Loaded>, ApiError> {
        self.loaded.get().cloned().ok_or_else(|| ApiError::unavailable("the model is being loaded: ask again later"))
    }

    pub(crate) fn drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }

    /// Requests that are being answered.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::SeqCst)
    }

    /// Counts a request in.
    ///
    /// # Errors
    /// 503 once the server is ending.
    pub(crate) fn enter(&self) -> Result<InFlight, ApiError> {
        self.in_flight.fetch_add(1, Ordering::SeqCst);
        let entered = InFlight(self.in_flight.clone()); // counted before the question: draining waits for it, or it is refused
        if self.is_draining() {
            return Err(ApiError::unavailable("the server is ending and takes no more requests"));
        }
        Ok(entered)
    }
}

impl Loaded {
    /// What answers to this name, where something does.
    pub(crate) fn served(&self, name: &str) -> Option<&Served> {
        self.models.iter().find(|served| served.name == name)
    }

    /// The names that it answers to.
    pub(crate) fn names(&self) -> Vec<&str> {
        self.models.iter().map(|served| served.name.as_str()).collect()
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// A number that differs from call to call; no secret.
pub(crate) fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}
