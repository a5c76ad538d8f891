//! `vora serve`: a model over HTTP.

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use anyhow::Result;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use vora_infer::{EngineConfig, Width};
use vora_serve::{ServeConfig, Server};

use crate::model::ModelArgs;
use crate::size;

/// Serve a model over HTTP as OpenAI's API, with a page to chat on.
///
/// POST /v1/chat/completions, GET /v1/models, /health, /metrics, /openapi.json, and the page at /. Pictures come as `data:`
/// addresses in `image_url`. Where adapters are apart from the weights, the model NAME:base answers without them; each of
/// --lora-modules answers by its own name, in one batch with the others and over one copy of the weights.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vora serve runs/scenes/merged
  vora serve runs/scenes/final --served-model-name scenes --port 8080 --max-batch 8 --cache 512MiB
  VORA_API_KEY=secret vora serve runs/scenes/merged --host 0.0.0.0
  vora serve runs/scenes/merged --weights int8
  vora serve HuggingFaceTB/SmolLM2-135M-Instruct --lora-modules cats=adapters/cats scenes=runs/scenes/final
  vora serve runs/scenes/merged --allow-images-from pictures.example.org

  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{\"model\": \"merged\", \"messages\": [{\"role\": \"user\", \"content\": \"What is a circle?\"}]}'")]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Where to listen; anything but this machine alone needs a key
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    /// 0 takes a free one
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// The name that requests call the model by [default: the last part of MODEL]
    #[arg(long, value_name = "NAME")]
    served_model_name: Option<String>,
    /// A key that requests have to bring, as `Authorization: Bearer KEY`; may be given several times. Other users of the
    /// machine see arguments: the variable is better
    #[arg(long, value_name = "KEY", env = "VORA_API_KEY", hide_env_values = true)]
    api_key: Vec<String>,
    /// A host (or HOST:PORT) that pictures may be fetched from; may be given several times. Addresses of private networks
    /// are never asked
    #[arg(long, value_name = "HOST")]
    allow_images_from: Vec<String>,
    /// Requests that are answered at once
    #[arg(long, default_value_t = EngineConfig::default().max_batch)]
    max_batch: usize,
    /// Requests that wait for a place among them; more are answered 429
    #[arg(long, default_value_t = EngineConfig::default().max_waiting)]
    max_waiting: usize,
    /// Memory for keys and values
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = size::bytes)]
    cache: u64,
    /// What the weights are brought into: f32, bf16, int8 or int4 (on a CPU); else as they are
    #[arg(long, value_name = "WIDTH", value_parser = Width::parse)]
    weights: Option<Width>,
    /// Seconds that running requests have to end after the first signal; a second one ends at once
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    drain: u64,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let mut engine = EngineConfig::default();
    (engine.max_batch, engine.max_waiting) = (args.max_batch, args.max_waiting);
    engine.cache_bytes = usize::try_from(args.cache)?;
    engine.width = args.weights;
    engine.validate()?;
    let mut config = ServeConfig::new(args.served_model_name.clone().unwrap_or_else(|| args.model.short_name()));
    (config.host, config.port) = (args.host.clone(), args.port);
    (config.api_keys, config.image_hosts) = (args.api_key.clone(), args.allow_images_from.clone());
    let name = config.name.clone();

    let server = Server::bind(config)?;
    let ready = Arc::new(AtomicBool::new(false));
    let signals = signals(ready.clone())?;
    server.answer_with(args.model.open()?, engine)?;
    writeln!(std::io::stdout(), "`{name}` answers on http://{}", server.address())?;
    ready.store(true, Ordering::SeqCst);

    let signal = signals.recv()?;
    let answered = server.drain(Duration::from_secs(args.drain));
    if !answered {
        tracing::warn!("{} s have passed: requests are given up", args.drain);
    }
    drop(server);
    Ok(ExitCode::from(u8::try_from(128 + signal).unwrap_or(1)))
}

/// The signal to end, once it comes. A second one, and one while the model is loaded, ends the program where it stands.
fn signals(ready: Arc<AtomicBool>) -> Result<Receiver<i32>> {
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let (first, of_first) = mpsc::channel();
    std::thread::spawn(move || {
        for signal in signals.forever() {
            if !ready.swap(false, Ordering::SeqCst) || first.send(signal).is_err() {
                signal_hook::low_level::exit(128 + signal);
            }
        }
    });
    Ok(of_first)
}
