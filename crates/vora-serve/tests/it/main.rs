//! The server on a tiny model, asked over raw sockets.

mod client;
mod faults;
mod limits;
mod model;
mod page;
mod refused;
mod soak;
mod together;

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vora_infer::EngineConfig;
use vora_serve::{ServeConfig, Server};

use client::{Reply, post};

/// A server on a free port of this machine, its model loaded.
fn serve(change: impl FnOnce(&mut ServeConfig, &mut EngineConfig)) -> Server {
    let (server, engine) = loading(change);
    server.answer_with(model::assistant(), engine).unwrap();
    server
}

/// A server whose model is not loaded, and how it is to be.
fn loading(change: impl FnOnce(&mut ServeConfig, &mut EngineConfig)) -> (Server, EngineConfig) {
    let (mut config, mut engine) = (ServeConfig::new("tiny"), EngineConfig::default());
    config.port = 0;
    engine.cache_bytes = 8 << 20;
    change(&mut config, &mut engine);
    (Server::bind(config).unwrap(), engine)
}

/// A request for an answer of `max_tokens` that does not end before.
fn long(text: &str, max_tokens: usize) -> Value {
    json!({
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens, "temperature": 0, "logit_bias": {"2": -100},
    })
}

fn about(picture: &str, text: &str, max_tokens: usize) -> Value {
    let mut request = long("", max_tokens);
    request["messages"][0]["content"] =
        json!([{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": text}]);
    request
}

fn ask(server: &Server, request: &Value) -> Reply {
    post(server, "/v1/chat/completions", request.to_string().as_bytes())
}

/// A number of /metrics.
fn metric(server: &Server, name: &str) -> f64 {
    let page = client::get(server, "/metrics").text();
    let line =
        page.lines().find(|line| line.starts_with(&format!("vora:{name}{{"))).unwrap_or_else(|| panic!("{page}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

/// Waits until it is so, ten seconds at most.
#[track_caller]
fn until(what: &str, so: impl Fn() -> bool) -> Duration {
    let start = Instant::now();
    while !so() {
        assert!(start.elapsed() < Duration::from_secs(10), "not in time: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
    start.elapsed()
}
