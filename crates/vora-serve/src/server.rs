//! The server: a socket, connections, a model that comes later, and an orderly end.

use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use vora_infer::{Assistant, Engine, EngineConfig};

use crate::config::ServeConfig;
use crate::connection::Patient;
use crate::places::Place;
use crate::router;
use crate::served::Served;
use crate::state::{Loaded, State};

/// Bytes that the system keeps of an answer that its client does not take.
const SEND_BUFFER: u32 = 128 << 10;
/// Bytes of a request's head.
const MAX_HEAD: usize = 64 << 10;
/// The temperature that OpenAI's API takes where nobody names one.
const TEMPERATURE: f64 = 1.0;
/// How long connections may take to say their last bytes.
const LAST_BYTES: Duration = Duration::from_secs(2);

/// A server that listens. Dropped, it ends at once.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    state: Arc<State>,
    ending: watch::Sender<bool>,
    runtime: Option<Runtime>, // until it is dropped
}

impl Server {
    /// Listens, and says of itself that it is loading until [`answer_with`](Self::answer_with).
    ///
    /// # Errors
    /// A host that has no address or can be reached from elsewhere without a key; a port that is taken.
    pub fn bind(config: ServeConfig) -> Result<Self> {
        let place = || format!("cannot listen on {}:{}", config.host, config.port);
        let addresses: Vec<SocketAddr> = (&*config.host, config.port).to_socket_addrs().with_context(place)?.collect();
        config.validate(addresses.iter().map(SocketAddr::ip))?;
        let address = *addresses.first().ok_or_else(|| anyhow!("the host has no address")).with_context(place)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .max_blocking_threads(32)
            .thread_name("vora-serve")
            .enable_all()
            .build()?;
        let listener = runtime.block_on(async { listen(address) }).with_context(place)?;
        let address = listener.local_addr()?;
        let state = Arc::new(State::new(config, address.ip().is_loopback()));
        let (ending, is_ending) = watch::channel(false);
        runtime.spawn(accept(listener, state.clone(), is_ending));
        Ok(Self { address, state, ending, runtime: Some(runtime) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers with this model from now on, and by the names of the adapters that were added to it.
    ///
    /// # Errors
    /// As [`Engine::start`], and an adapter that is called as the served model is.
    pub fn answer_with(&self, assistant: Assistant, config: EngineConfig) -> Result<()> {
        let model = assistant.model();
        let models = Served::all(&self.state.config.name, &assistant)?;
        let context = model.llm().config().max_position_embeddings;
        let tokenizer = assistant.tokenizer();
        let longest = (0..tokenizer.vocab_size()).map(|id| tokenizer.token_bytes(id).len()).max().unwrap_or(1);
        let most_text = longest.saturating_mul(usize::try_from(context)?);
        let sampling = assistant.sampling(TEMPERATURE);
        let engine = Engine::start(assistant, config)?;
        self.state.set_loaded(Loaded { engine, models, context, sampling, most_text });
        Ok(())
    }

    /// Takes no more requests, and returns once the running ones are answered or `limit` has passed: whether all were.
    pub fn drain(&self, limit: Duration) -> bool {
        self.state.drain();
        let wait = |end: Instant, busy: &dyn Fn() -> usize| {
            while busy() > 0 && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(10));
            }
            busy() == 0
        };
        let answered = wait(Instant::now() + limit, &|| self.state.in_flight());
        if let (false, Ok(loaded)) = (answered, self.state.loaded()) {
            loaded.engine.give_up(); // every request is told
            wait(Instant::now() + LAST_BYTES, &|| self.state.in_flight());
        }
        let _ = self.ending.send(true);
        wait(Instant::now() + LAST_BYTES, &|| self.state.places.open());
        answered
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.state.drain();
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_millis(200)); // what runs is taken back with its connections
        }
        if let Ok(loaded) = self.state.loaded() {
            loaded.engine.finish();
        }
    }
}

/// A socket whose connections have small buffers.
fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.set_send_buffer_size(SEND_BUFFER)?;
    socket.bind(address)?;
    socket.listen(1024)
}

/// Takes connections, each of which gets a place.
async fn accept(listener: TcpListener, state: Arc<State>, is_ending: watch::Receiver<bool>) {
    loop {
        match listener.accept().await {
            Ok((socket, _)) => {
                let place = Arc::new(state.places.take().await);
                let (state, is_ending) = (state.clone(), is_ending.clone());
                tokio::spawn(async move { serve(socket, &state, place, is_ending).await });
            }
            // Out of descriptors, as a rule: others will close.
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// One connection, until either side closes it, or another one needs its place.
async fn serve(socket: TcpStream, state: &Arc<State>, place: Arc<Place>, mut is_ending: watch::Receiver<bool>) {
    let _ = socket.set_nodelay(true);
    let patience = state.config.patience;
    let service = service_fn(|request| router::answer(state.clone(), place.clone(), request));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(patience)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(Patient::new(socket, patience)), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        result = connection.as_mut() => Some(result),
        () = async { drop(is_ending.wait_for(|ending| *ending).await) } => None,
        () = place.given_up() => return,
    };
    let result = match ended {
        Some(result) => result,
        None => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!("a connection ended: {error}"); // the client left, or was too slow
    }
}
