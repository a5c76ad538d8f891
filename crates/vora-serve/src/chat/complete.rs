//! One request from its body to its answer's beginning.

use std::sync::Arc;
use std::time::Instant;

use serde_json::Value;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::{self, UnboundedSender};
use vora_infer::{Event, Request, Ticket};

use super::answer::whole;
use super::messages::{Conversation, PictureSource};
use super::pictures;
use super::rules::Rules;
use super::running::Running;
use super::stream::ChatStream;
use super::wire::Wire;
use crate::error::ApiError;
use crate::metrics::Watch;
use crate::state::{InFlight, Loaded, State};

/// An answer, or its beginning.
#[derive(Debug)]
pub(crate) enum Answered {
    /// As JSON.
    Whole(Value),
    /// As server-sent events.
    Stream(Box<ChatStream>),
}

/// What has to be so before a body is worth reading.
///
/// # Errors
/// 503 and 429.
pub(crate) fn prepare_for(state: &Arc<State>) -> Result<(Arc<Loaded>, InFlight), ApiError> {
    let in_flight = state.enter()?;
    let loaded = state.loaded()?;
    if loaded.engine.stats().waiting >= loaded.engine.config().max_waiting as u64 {
        return Err(ApiError::overloaded());
    }
    Ok((loaded, in_flight))
}

/// Answers the request in `body`, at once or as a stream; `room` is what the body takes of the memory for all. Dropped, it
/// takes the request back.
///
/// # Errors
/// What is wrong with the request, or with the server.
pub(crate) async fn complete(
    state: &Arc<State>,
    loaded: Arc<Loaded>,
    in_flight: InFlight,
    body: Vec<u8>,
    room: OwnedSemaphorePermit,
) -> Result<Answered, ApiError> {
    let received = Instant::now();
    let asked = {
        let (state, loaded) = (state.clone(), loaded.clone());
        blocking(move || Asked::of(&body, &state, &loaded)).await?
    };
    let Asked { rules, conversation, model } = asked;
    let files = read_all(state, &conversation.pictures).await?;
    let params: Vec<String> = files.iter().map(|(param, _)| param.clone()).collect();

    let decoding = state.decoding.clone().acquire_owned().await.map_err(|_| ApiError::failed())?;
    let (events, of_events) = mpsc::unbounded_channel();
    let tickets = {
        let (state, rules, params, model) = (state.clone(), rules.clone(), params.clone(), model.clone());
        blocking(move || {
            let _until_submitted = (decoding, room);
            let images = pictures::decode(&files, state.config.max_pixels)?;
            drop(files);
            let request = Request::new(images, conversation.messages);
            let request = request.with_max_new_tokens(rules.max_tokens).with_stop(rules.stop.clone());
            let request = request.with_format(rules.format.clone());
            let request = rules.logprobs.into_iter().fold(request, Request::with_logprobs);
            let request = loaded.served(&model).ok_or_else(ApiError::failed)?.of(request);
            submit(&state, &loaded, request, &rules, events, received)
                .map_err(|error| ApiError::of_engine(&error, &params))
        })
        .await?
    };
    let running = Running { events: of_events, tickets, model, rules, pictures: params, _in_flight: in_flight };
    begin(running).await
}

/// A request that is checked as far as it can be without its pictures.
struct Asked {
    rules: Rules,
    conversation: Conversation,
    model: String,
}

impl Asked {
    fn of(body: &[u8], state: &State, loaded: &Loaded) -> Result<Self, ApiError> {
        let wire = Wire::parse(body)?;
        let rules = Rules::of(&wire, &state.config, loaded)?;
        let model = wire.model.unwrap_or_else(|| state.config.name.clone());
        if loaded.served(&model).is_none() {
            return Err(ApiError::no_such_model(&model, &loaded.names()));
        }
        let conversation = Conversation::of(wire.messages.0, state.config.max_pictures)?;
        let (bytes, most) = (conversation.text_len(), loaded.most_text);
        if bytes > most {
            let message = format!(
                "the text has {bytes} bytes, which is more than the model's context of {} tokens",
                loaded.context
            );
            return Err(ApiError::too_long("messages", message));
        }
        Ok(Self { rules, conversation, model })
    }
}

/// The files of all pictures, each with its field.
async fn read_all(state: &Arc<State>, sources: &[PictureSource]) -> Result<Vec<(String, Vec<u8>)>, ApiError> {
    let mut files = Vec::with_capacity(sources.len());
    for source in sources {
        let PictureSource { param, url } = source;
        let fetching = if url.starts_with("data:") {
            None
        } else {
            Some(state.fetching.clone().acquire_owned().await.map_err(|_| ApiError::failed())?)
        };
        let (state, source) = (state.clone(), PictureSource { param: param.clone(), url: url.clone() });
        let file = blocking(move || {
            let _until_read = fetching;
            pictures::read(&source, &state.fetcher)
        });
        files.push((param.clone(), file.await?));
    }
    Ok(files)
}

/// Hands the engine every choice of a request.
fn submit(
    state: &Arc<State>,
    loaded: &Loaded,
    request: Request<'static>,
    rules: &Rules,
    events: UnboundedSender<(usize, Event)>,
    received: Instant,
) -> anyhow::Result<Vec<Option<Ticket>>> {
    let mut tickets = Vec::with_capacity(rules.n);
    for (choice, request) in std::iter::repeat_n(request, rules.n).enumerate() {
        let sampling = rules.sampling.clone();
        let seed = sampling.seed.wrapping_add(choice as u64);
        let events = events.clone();
        let mut watch = Watch::new(state.metrics.clone(), received);
        let on_event = move |event| {
            watch.saw(&event);
            let _ = events.send((choice, event)); // nobody listens where the client has left
        };
        tickets.push(Some(loaded.engine.submit(request.with_sampling(sampling.with_seed(seed)), on_event)?));
    }
    Ok(tickets)
}

/// Waits for the first that becomes of a request: what may be wrong with it only the model knows.
async fn begin(mut running: Running) -> Result<Answered, ApiError> {
    if !running.rules.stream {
        return Ok(Answered::Whole(whole(running).await?));
    }
    match running.events.recv().await {
        Some((_, Event::Failed(error))) => Err(ApiError::of_engine(&error, &running.pictures)),
        Some(first) => Ok(Answered::Stream(Box::new(ChatStream::new(running, first)))),
        None => Err(ApiError::failed()),
    }
}

/// Runs what takes the processor where no connection waits for it.
async fn blocking<T: Send + 'static>(
    run: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(run).await.unwrap_or_else(|error| {
        tracing::error!("a request failed: {error}");
        Err(ApiError::failed())
    })
}
