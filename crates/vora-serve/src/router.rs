//! From a request's head to who answers it.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::{Body, Incoming};
use hyper::header::{ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER};
use hyper::{Method, Request, Response, StatusCode};
use percent_encoding::percent_decode_str;
use serde_json::json;
use tokio::time::timeout;

use crate::body::{self, Held, ResponseBody};
use crate::chat::Answered;
use crate::error::ApiError;
use crate::places::Place;
use crate::state::State;
use crate::{chat, guard, models, page};

/// The description of what is answered here.
const OPENAPI: &str = include_str!("openapi.json");
/// How long a request waits for room among the bodies that are held at once.
const ROOM: Duration = Duration::from_secs(5);

/// What may be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Route<'a> {
    Page,
    Health,
    Metrics,
    OpenApi,
    Models,
    Model(&'a str),
    Chat,
}

impl<'a> Route<'a> {
    fn of(path: &'a str) -> Option<Self> {
        Some(match path {
            "/" => Self::Page,
            "/health" => Self::Health,
            "/metrics" => Self::Metrics,
            "/openapi.json" => Self::OpenApi,
            "/v1/models" => Self::Models,
            "/v1/chat/completions" => Self::Chat,
            path => Self::Model(path.strip_prefix("/v1/models/")?),
        })
    }

    fn name(self) -> &'static str {
        match self {
            Self::Page => "/",
            Self::Health => "/health",
            Self::Metrics => "/metrics",
            Self::OpenApi => "/openapi.json",
            Self::Models => "/v1/models",
            Self::Model(_) => "/v1/models/{model}",
            Self::Chat => "/v1/chat/completions",
        }
    }

    fn takes(self, method: &Method) -> bool {
        if self == Self::Chat { method == Method::POST } else { method == Method::GET || method == Method::HEAD }
    }
}

/// Answers a request that came by a connection in `place`. Dropped before it is done, it takes back what it asked of the engine.
pub(crate) async fn answer(
    state: Arc<State>,
    place: Arc<Place>,
    request: Request<Incoming>,
) -> Result<Response<Held>, Infallible> {
    let (head, mut incoming) = request.into_parts();
    let route = Route::of(head.uri.path());
    let checked = if route == Some(Route::Health) {
        Ok(())
    } else {
        guard::check_site(&head.headers, &head.uri, state.here).and_then(|()| state.keys.check(&head.headers))
    };
    let result = match (checked, route) {
        // Whoever has no key yet needs the page to type it in; there is nothing secret in it.
        (Err(error), Some(Route::Page)) if error.status == StatusCode::UNAUTHORIZED => Ok((error.status, html())),
        (Err(error), _) => Err(error),
        (Ok(()), None) => Err(ApiError::refused(StatusCode::NOT_FOUND, "there is nothing at this address")),
        (Ok(()), Some(route)) if !route.takes(&head.method) => {
            Err(ApiError::refused(StatusCode::METHOD_NOT_ALLOWED, "this address does not take this method"))
        }
        (Ok(()), Some(Route::Chat)) => chat(&state, &place, &head.headers, &mut incoming).await,
        (Ok(()), Some(route)) => plain(&state, route),
    };
    let read_whole = incoming.is_end_stream();
    if !read_whole {
        body::linger(&mut incoming).await;
    }
    let name = route.map_or("other", Route::name);
    state.metrics.responded(name, result.as_ref().map_or_else(|error| error.status, |(status, _)| *status).as_u16());
    place.works();
    Ok(respond(&state, result, route, read_whole).map(|body| Held::new(body, place)))
}

fn plain(state: &Arc<State>, route: Route<'_>) -> Result<(StatusCode, ResponseBody), ApiError> {
    let body = match route {
        Route::Health => return Ok(health(state)),
        Route::Page => html(),
        Route::OpenApi => ResponseBody::Whole { bytes: OPENAPI.into(), content_type: "application/json" },
        Route::Metrics => {
            let stats = state.loaded().map_or_else(|_| Default::default(), |loaded| loaded.engine.stats());
            let text = state.metrics.text(&state.config.name, &stats, state.places.open() as u64);
            ResponseBody::Whole { bytes: text.into(), content_type: "text/plain; version=0.0.4; charset=utf-8" }
        }
        Route::Models => ResponseBody::json(&models::list(state, &*state.loaded()?)),
        Route::Model(name) => {
            let loaded = state.loaded()?;
            let name = percent_decode_str(name).decode_utf8_lossy();
            let found = models::named(state, &loaded, &name);
            let missing = || ApiError::no_such_model(&name, &loaded.names());
            ResponseBody::json(&found.ok_or_else(missing)?)
        }
        Route::Chat => return Err(ApiError::failed()),
    };
    Ok((StatusCode::OK, body))
}

fn html() -> ResponseBody {
    ResponseBody::Whole { bytes: page::HTML.into(), content_type: "text/html; charset=utf-8" }
}

fn health(state: &State) -> (StatusCode, ResponseBody) {
    let (status, word) = match (state.is_draining(), state.loaded().is_ok()) {
        (true, _) => (StatusCode::SERVICE_UNAVAILABLE, "ending"),
        (false, false) => (StatusCode::SERVICE_UNAVAILABLE, "loading"),
        (false, true) => (StatusCode::OK, "ok"),
    };
    (status, ResponseBody::json(&json!({"status": word})))
}

async fn chat(
    state: &Arc<State>,
    place: &Place,
    headers: &hyper::HeaderMap,
    incoming: &mut Incoming,
) -> Result<(StatusCode, ResponseBody), ApiError> {
    let (loaded, in_flight) = chat::prepare_for(state)?;
    let is_json = headers.get(CONTENT_TYPE).is_some_and(|value| {
        let value = value.as_bytes();
        value.get(..16).is_some_and(|start| start.eq_ignore_ascii_case(b"application/json"))
    });
    if !is_json {
        let message = "the header Content-Type has to be application/json";
        return Err(ApiError::refused(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
    }
    // As much as the body says of itself, and otherwise as much as it may be, in KiB.
    let most = state.config.max_body as u64;
    let kib = (incoming.size_hint().upper().unwrap_or(most).min(most) >> 10) as u32 + 1;
    let room = timeout(ROOM, state.bodies.clone().acquire_many_owned(kib)).await;
    let Ok(Ok(room)) = room else { return Err(ApiError::overloaded()) };
    let bytes = body::read(incoming, &state.config).await?;
    place.works();
    let body = match chat::complete(state, loaded, in_flight, bytes, room).await? {
        Answered::Whole(whole) => ResponseBody::json(&whole),
        Answered::Stream(stream) => ResponseBody::Stream(stream),
    };
    Ok((StatusCode::OK, body))
}

fn respond(
    state: &State,
    result: Result<(StatusCode, ResponseBody), ApiError>,
    route: Option<Route<'_>>,
    read_whole: bool,
) -> Response<ResponseBody> {
    let error = result.as_ref().err().cloned();
    let (status, body) = result.unwrap_or_else(|error| (error.status, ResponseBody::json(&error.json())));
    let content_type = body.content_type();
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    if content_type.starts_with("text/html") {
        headers.insert(HeaderName::from_static("content-security-policy"), state.page_policy.clone());
    }
    let mut set = |name: HeaderName, value: &'static str| headers.insert(name, HeaderValue::from_static(value));
    set(CONTENT_TYPE, content_type);
    set(CACHE_CONTROL, "no-store");
    set(HeaderName::from_static("x-content-type-options"), "nosniff");
    set(HeaderName::from_static("referrer-policy"), "no-referrer");
    set(HeaderName::from_static("cross-origin-resource-policy"), "same-origin");
    if matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
        set(RETRY_AFTER, "1");
    }
    if status == StatusCode::METHOD_NOT_ALLOWED {
        set(ALLOW, if route == Some(Route::Chat) { "POST" } else { "GET, HEAD" });
    }
    if error.is_some() && !read_whole {
        set(CONNECTION, "close");
    }
    response
}
