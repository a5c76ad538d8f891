//! Client of the hub: lists a model's files and brings them into the cache, resumed where cut off and checked against the
//! hash that the hub states.

use std::{
    env, fs,
    io::Read,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Error, Result, anyhow, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;
use ureq::{
    Agent, Body,
    config::RedirectAuthHeaders,
    http::{HeaderMap, Response, StatusCode},
    tls::{PemItem, RootCerts, TlsConfig, parse_pem},
};
use vora_hub::{Cache, Repo};

use super::note;
use super::partial::{FileInfo, Partial};

const TRIES: u32 = 5; // in a row without one byte gained
const LONGEST_LISTING: u64 = 32 << 20; // bytes

/// The hub, or a mirror of it.
#[derive(Debug)]
pub(crate) struct Hub {
    endpoint: String,
    token: Option<String>,
    agent: Agent,
    pause: Duration, // before another try
}

/// What a model's `main` consists of.
#[derive(Debug)]
pub(crate) struct Listing {
    name: String,
    revision: String,
    files: Vec<String>,
}

impl Hub {
    /// Reads `HF_ENDPOINT`, `HF_TOKEN`, proxies and certificates; an error where `HF_HUB_OFFLINE` forbids to ask the hub.
    pub(crate) fn from_env() -> Result<Self> {
        let var = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
        for name in ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"] {
            let value = var(name).unwrap_or_default().to_uppercase();
            ensure!(!["1", "ON", "YES", "TRUE"].contains(&value.as_str()), "{name} is set, so the hub is not asked");
        }
        let mut config = Agent::config_builder();
        if let Some(path) = var("REQUESTS_CA_BUNDLE").or_else(|| var("SSL_CERT_FILE")) {
            let pem = fs::read(&path).with_context(|| format!("reading certificates from {path}"))?;
            let certificates: Vec<_> = parse_pem(&pem)
                .filter_map(
                    |item| if let Ok(PemItem::Certificate(certificate)) = item { Some(certificate) } else { None },
                )
                .collect();
            ensure!(!certificates.is_empty(), "{path} has no certificate in it");
            config =
                config.tls_config(TlsConfig::builder().root_certs(RootCerts::new_with_certs(&certificates)).build());
        }
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        Ok(Self::new(&endpoint, var("HF_TOKEN"), config, Duration::from_secs(1)))
    }

    fn new(
        endpoint: &str,
        token: Option<String>,
        config: ureq::config::ConfigBuilder<ureq::typestate::AgentScope>,
        pause: Duration,
    ) -> Self {
        let config = config
            .timeout_resolve(Some(Duration::from_secs(5)))
            .timeout_connect(Some(Duration::from_secs(5)))
            .timeout_recv_response(Some(Duration::from_secs(30)))
            .timeout_per_read(Some(Duration::from_secs(30)))
            .http_status_as_error(false)
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .user_agent(concat!("vora-xtask/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .build();
        Self { endpoint: endpoint.trim_end_matches('/').into(), token, agent: config.into(), pause }
    }

    /// Asks which files model `name` has, and keeps those that loading it needs.
    pub(crate) fn listing(&self, name: &str) -> Result<Listing> {
        let url = format!("{}/api/models/{name}/revision/main", self.endpoint);
        let mut response = self.get(&url, 0).with_context(|| format!("cannot reach {}", self.endpoint))?;
        check_status(&response, &url)?;
        let text = response.body_mut().with_config().limit(LONGEST_LISTING).read_to_string();
        let text = text.with_context(|| format!("reading {url}"))?;
        let listing: Value = serde_json::from_str(&text).with_context(|| format!("{url} gave no JSON"))?;
        let revision = listing["sha"].as_str().unwrap_or_default();
        ensure!(is_hex(revision, 40), "{url} gave no commit");
        let files = listing["siblings"].as_array().with_context(|| format!("{url} gave no list of files"))?;
        let files: Vec<_> = files.iter().filter_map(|file| file["rfilename"].as_str()).collect();
        Ok(Listing { name: name.into(), revision: revision.into(), files: wanted(name, &files)? })
    }

    /// Brings all listed files into the cache and gives the snapshot's folder; what is there already is kept.
    pub(crate) fn fetch(&self, cache: &Cache, listing: &Listing) -> Result<PathBuf> {
        let repo = cache.repo(&listing.name)?;
        for file in &listing.files {
            self.fetch_file(&repo, listing, file).with_context(|| format!("fetching {file} of {}", listing.name))?;
        }
        repo.set_main(&listing.revision)?;
        Ok(repo.snapshot(&listing.revision))
    }

    fn fetch_file(&self, repo: &Repo, listing: &Listing, file: &str) -> Result<()> {
        let url = format!("{}/{}/resolve/{}/{file}", self.endpoint, listing.name, listing.revision);
        let info = self.info(&url)?;
        let blob = repo.blob(&info.etag);
        let _lock = repo.lock(&info.etag)?;
        if fs::metadata(&blob).map(|blob| blob.len()).ok() != Some(info.size) {
            let partial = blob.with_file_name(format!("{}.incomplete", info.etag));
            self.download(&url, file, &info, &partial)?;
            fs::rename(&partial, &blob).with_context(|| format!("cannot move {file} to {}", blob.display()))?;
        }
        repo.link(&listing.revision, file, &info.etag)
    }

    /// Asks for hash and size of the file at `url`; a redirect within the hub is followed, one to its storage is not,
    /// since the answer before it has both.
    fn info(&self, url: &str) -> Result<FileInfo> {
        let mut at = url.to_owned();
        for _ in 0..5 {
            let request = self.agent.head(&at).config().max_redirects(0).max_redirects_will_error(false).build();
            let response = self.authorize(request).call().with_context(|| format!("cannot reach {at}"))?;
            let headers = response.headers();
            let etag = header(headers, "x-linked-etag").or_else(|| header(headers, "etag"));
            if response.status().is_redirection() && header(headers, "x-linked-etag").is_none() {
                let location = header(headers, "location").with_context(|| format!("{at} redirects to nowhere"))?;
                at = match location.strip_prefix(&self.endpoint).unwrap_or(location) {
                    path if path.starts_with('/') => format!("{}{path}", self.endpoint),
                    _ => bail!("{at} redirects to {location} without saying what the file's hash is"),
                };
                continue;
            }
            if !response.status().is_redirection() {
                check_status(&response, &at)?;
            }
            let etag = etag.map(|etag| etag.trim_start_matches("W/").trim_matches('"')).unwrap_or_default();
            ensure!(is_hex(etag, 64) || is_hex(etag, 40), "{at} states neither a sha256 nor a git hash, but `{etag}`");
            let size = header(headers, "x-linked-size").or_else(|| header(headers, "content-length"));
            let size = size.and_then(|size| size.parse().ok()).with_context(|| format!("{at} states no size"))?;
            return Ok(FileInfo { etag: etag.into(), size });
        }
        bail!("{url} redirects in a circle")
    }

    /// Fills `partial`, from where an earlier run stopped, and checks it; a file with a wrong hash is deleted.
    fn download(&self, url: &str, file: &str, info: &FileInfo, partial: &Path) -> Result<()> {
        let mut partial = Partial::open(partial, info, progress_bar(file, info.size))?;
        let mut tries = 0;
        while partial.len < info.size {
            let before = partial.len;
            let cut = match self.append(url, info, &mut partial) {
                Ok(()) => continue,
                Err(Stop::Cut(cut)) => cut,
                Err(Stop::Failed(error)) => return Err(error),
            };
            tries = if partial.len > before { 0 } else { tries + 1 };
            if tries == TRIES {
                let kept =
                    format!("{} of {} bytes are kept, the same command goes on from there", partial.len, info.size);
                return Err(cut.context(kept));
            }
            std::thread::sleep(self.pause);
        }
        partial.finish(info)
    }

    /// Asks for what `partial` lacks and writes what comes, until the end or until the connection breaks.
    fn append(&self, url: &str, info: &FileInfo, partial: &mut Partial) -> Result<(), Stop> {
        let mut response = self.get(url, partial.len).map_err(|error| Stop::Cut(error.into()))?;
        let status = response.status();
        match status {
            StatusCode::PARTIAL_CONTENT => {
                let range = header(response.headers(), "content-range").unwrap_or_default();
                if !range.starts_with(&format!("bytes {}-", partial.len)) {
                    return Err(Stop::Failed(anyhow!("{url} gave the range `{range}`, not from {}", partial.len)));
                }
            }
            StatusCode::OK => partial.restart().map_err(Stop::Failed)?, // a server that cannot resume
            StatusCode::TOO_MANY_REQUESTS => return Err(Stop::Cut(anyhow!("{url} answered {status}"))),
            _ if status.is_server_error() => return Err(Stop::Cut(anyhow!("{url} answered {status}"))),
            _ => {
                return Err(Stop::Failed(
                    check_status(&response, url).err().unwrap_or_else(|| anyhow!("{url} answered {status}")),
                ));
            }
        }
        let mut body = response.body_mut().as_reader().take(info.size - partial.len + 1);
        let mut buffer = vec![0; 1 << 16];
        loop {
            match body.read(&mut buffer) {
                Ok(0) if partial.len < info.size => return Err(Stop::Cut(anyhow!("{url} ended early"))),
                Ok(0) => return Ok(()),
                Ok(count) => partial.write(&buffer[..count]).map_err(Stop::Failed)?,
                Err(error) => return Err(Stop::Cut(error.into())),
            }
        }
    }

    fn get(&self, url: &str, from: u64) -> Result<Response<Body>, ureq::Error> {
        let request = self.authorize(self.agent.get(url));
        if from == 0 { request.call() } else { request.header("range", format!("bytes={from}-")).call() }
    }

    fn authorize<T>(&self, request: ureq::RequestBuilder<T>) -> ureq::RequestBuilder<T> {
        match &self.token {
            Some(token) => request.header("authorization", format!("Bearer {token}")),
            None => request,
        }
    }
}

/// Why a download stopped: a broken connection is tried again, all else is not.
#[derive(Debug)]
enum Stop {
    Cut(Error),
    Failed(Error),
}

/// Of a model's files those that loading needs: safetensors, JSON, tokenizer and chat template.
fn wanted(name: &str, files: &[&str]) -> Result<Vec<String>> {
    let top_level =
        || files.iter().copied().filter(|file| !file.contains(['/', '\\', '?', '#', '%']) && !file.starts_with('.'));
    let is_model = |file: &str| file.starts_with("model") && file.ends_with(".safetensors");
    let has_model = top_level().any(is_model);
    let wants = |file: &&str| match file.rsplit_once('.') {
        Some((_, "safetensors")) => !has_model || is_model(file), // not a second copy under another name
        Some((_, "json" | "jinja")) => true,
        _ => ["tokenizer.model", "merges.txt", "vocab.txt"].contains(file),
    };
    let wanted: Vec<_> = top_level().filter(wants).map(str::to_owned).collect();
    if !wanted.iter().any(|file| file.ends_with(".safetensors")) {
        let is_pickle = |file: &&str| [".bin", ".pt", ".pth", ".ckpt"].iter().any(|ending| file.ends_with(ending));
        match top_level().find(is_pickle) {
            Some(pickle) => bail!(
                "{name} has its weights as pickle only ({pickle}); reading a pickle runs whatever code it carries, so it is \
                 refused: look for a version of the model in safetensors, or convert it where you trust it"
            ),
            None => bail!("{name} has no safetensors file"),
        }
    }
    Ok(wanted)
}

fn check_status(response: &Response<Body>, url: &str) -> Result<()> {
    let status = response.status();
    match status {
        _ if status.is_success() => Ok(()),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            bail!("{url} answered {status}: is the name right, and does HF_TOKEN give access to it?")
        }
        _ => bail!("{url} answered {status}"),
    }
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

fn is_hex(text: &str, len: usize) -> bool {
    text.len() == len && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// A bar on a terminal; elsewhere one line for a file that takes a while.
fn progress_bar(file: &str, size: u64) -> ProgressBar {
    let bar = ProgressBar::new(size).with_message(file.to_owned());
    if bar.is_hidden() && size > 1 << 20 {
        note(&format!("fetching {file}, {} MB", size.div_ceil(1_000_000)));
    }
    let style = ProgressStyle::with_template("{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec}, {eta} left");
    bar.with_style(style.expect("the template is right"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::{BufRead, BufReader, Write},
        net::{TcpListener, TcpStream},
        sync::{Arc, Mutex},
        thread,
    };

    const REVISION: &str = "0123456789abcdef0123456789abcdef01234567";

    /// A hub on this machine: `model.safetensors` by way of a storage under another host name, `config.json` directly.
    #[derive(Debug, Default)]
    struct Faults {
        cuts: Vec<usize>, // how many bytes the storage's next answers have before the connection breaks
        altered: bool,    // one byte of the weights is not what the hash says
        no_ranges: bool,  // the storage always sends the whole file
        log: Vec<String>, // of requests: method, path, `range` and `authorization`
        pickle: bool,     // the listing has a pickle and no safetensors
    }

    struct Server {
        endpoint: String,
        faults: Arc<Mutex<Faults>>,
    }

    fn weights() -> Vec<u8> {
        (0..200_000u32).map(|idx| (idx * 31 % 251) as u8).collect()
    }

    impl Server {
        fn start() -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let port = listener.local_addr().unwrap().port();
            let faults = Arc::new(Mutex::new(Faults::default()));
            let shared = faults.clone();
            thread::spawn(move || {
                for stream in listener.incoming() {
                    let shared = shared.clone();
                    thread::spawn(move || answer(&stream.unwrap(), port, &shared));
                }
            });
            Self { endpoint: format!("http://127.0.0.1:{port}"), faults }
        }

        fn hub(&self) -> Hub {
            hub(&self.endpoint)
        }

        fn faults(&self) -> std::sync::MutexGuard<'_, Faults> {
            self.faults.lock().unwrap()
        }

        fn logged(&self, part: &str) -> usize {
            self.faults().log.iter().filter(|line| line.contains(part)).count()
        }
    }

    fn hub(endpoint: &str) -> Hub {
        let config = Agent::config_builder().proxy(None);
        Hub::new(endpoint, Some("secret".into()), config, Duration::from_millis(1))
    }

    /// Answers one request; a connection serves no second one.
    fn answer(mut stream: &TcpStream, port: u16, faults: &Mutex<Faults>) {
        let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
        let Some(request) = lines.next() else { return };
        let headers: Vec<_> = lines.take_while(|line| !line.is_empty()).map(|line| line.to_lowercase()).collect();
        let value = |name: &str| headers.iter().find_map(|line| line.strip_prefix(&format!("{name}: "))).unwrap_or("");
        let mut faults = faults.lock().unwrap();
        faults.log.push(format!("{request} {} {}", value("range"), value("authorization")));
        let mut words = request.split(' ');
        let (method, path) = (words.next().unwrap(), words.next().unwrap());
        let config = b"{\"model_type\": \"llama\"}";
        let (head, body) = match path {
            "/api/models/org/model/revision/main" if faults.pickle => {
                ("200 OK\r\n".into(), json(&["config.json", "pytorch_model.bin"]))
            }
            "/api/models/org/model/revision/main" => (
                "200 OK\r\n".into(),
                json(&["README.md", "config.json", "model.safetensors", "onnx/model.onnx", "../x.json"]),
            ),
            _ if path == format!("/org/model/resolve/{REVISION}/config.json") => {
                ("307 Temporary Redirect\r\nLocation: /cache/config.json\r\n".into(), vec![])
            }
            "/cache/config.json" => {
                ("200 OK\r\nETag: \"230d5f4da0da586aad26ead694ea67cd15bd6df1\"\r\n".into(), config.to_vec())
            }
            _ if path == format!("/org/model/resolve/{REVISION}/model.safetensors") => {
                let (sha256, size) = (hash(&weights()), weights().len());
                let linked = format!("X-Linked-Etag: \"{sha256}\"\r\nX-Linked-Size: {size}\r\n");
                (format!("302 Found\r\n{linked}Location: http://localhost:{port}/storage\r\n"), vec![])
            }
            "/storage" => {
                let mut bytes = weights();
                bytes[100_000] ^= u8::from(faults.altered);
                match value("range").trim_start_matches("bytes=").trim_end_matches('-').parse::<usize>() {
                    Ok(from) if !faults.no_ranges => {
                        let range = format!("Content-Range: bytes {from}-{}/{}\r\n", bytes.len() - 1, bytes.len());
                        (format!("206 Partial Content\r\n{range}"), bytes.split_off(from))
                    }
                    _ => ("200 OK\r\n".into(), bytes),
                }
            }
            _ => ("404 Not Found\r\n".into(), vec![]),
        };
        let sent = if path == "/storage" && !faults.cuts.is_empty() { faults.cuts.remove(0) } else { body.len() };
        drop(faults);
        let head = format!("HTTP/1.1 {head}Content-Length: {}\r\nConnection: close\r\n\r\n", body.len());
        let _ = stream.write_all(head.as_bytes());
        if method == "GET" {
            let _ = stream.write_all(&body[..sent.min(body.len())]);
        }
    }

    fn json(files: &[&str]) -> Vec<u8> {
        let files: Vec<_> = files.iter().map(|file| serde_json::json!({ "rfilename": file })).collect();
        serde_json::json!({ "sha": REVISION, "siblings": files }).to_string().into()
    }

    fn hash(bytes: &[u8]) -> String {
        use sha2::Digest;
        format!("{:x}", sha2::Sha256::digest(bytes))
    }

    fn fetch(hub: &Hub, root: &Path) -> Result<PathBuf> {
        hub.fetch(&Cache::at(root), &hub.listing("org/model")?)
    }

    fn files(folder: &Path) -> Vec<String> {
        let Ok(entries) = fs::read_dir(folder) else { return vec![] };
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn fills_the_cache_as_python_does() {
        let (server, root) = (Server::start(), tempfile::tempdir().unwrap());
        let snapshot = fetch(&server.hub(), root.path()).unwrap();
        let model = root.path().join("models--org--model");
        assert_eq!(snapshot, model.join("snapshots").join(REVISION));
        assert_eq!(files(&snapshot), ["config.json", "model.safetensors"]);
        assert_eq!(
            files(&model.join("blobs")),
            ["230d5f4da0da586aad26ead694ea67cd15bd6df1".to_owned(), hash(&weights())]
        );
        assert_eq!(fs::read(snapshot.join("model.safetensors")).unwrap(), weights());
        assert_eq!(fs::read_to_string(model.join("refs/main")).unwrap(), REVISION);
        #[cfg(unix)]
        assert_eq!(
            fs::read_link(snapshot.join("model.safetensors")).unwrap(),
            Path::new("../../blobs").join(hash(&weights()))
        );
        assert_eq!(Cache::at(root.path()).repo("org/model").unwrap().main().as_deref(), Some(REVISION));
        // The token goes to the hub and not to its storage.
        assert_eq!((server.logged("GET /storage HTTP/1.1  "), server.logged("GET /storage HTTP/1.1  bearer")), (1, 0));
        assert_eq!(server.logged("/api/models/org/model/revision/main HTTP/1.1  bearer secret"), 1);
        // Nothing is fetched twice.
        fetch(&server.hub(), root.path()).unwrap();
        assert_eq!(server.logged("GET /storage"), 1);
    }

    #[test]
    fn goes_on_where_the_connection_broke() {
        let (server, root) = (Server::start(), tempfile::tempdir().unwrap());
        server.faults().cuts = vec![70_000, 0, 60_000];
        let snapshot = fetch(&server.hub(), root.path()).unwrap();
        assert_eq!(fs::read(snapshot.join("model.safetensors")).unwrap(), weights());
        assert_eq!(server.logged("GET /storage"), 4);
        assert_eq!(server.logged("bytes=70000-"), 2 * 2); // asked of the hub and of its storage
        assert_eq!(server.logged("bytes=130000-"), 2);
    }

    #[test]
    fn goes_on_where_an_earlier_run_stopped() {
        let (server, root) = (Server::start(), tempfile::tempdir().unwrap());
        server.faults().cuts = [&[70_000][..], &[0; TRIES as usize]].concat();
        let error = format!("{:#}", fetch(&server.hub(), root.path()).unwrap_err());
        assert!(error.contains("fetching model.safetensors of org/model: 70000 of 200000 bytes are kept"), "{error}");
        let model = root.path().join("models--org--model");
        assert!(!model.join("refs/main").exists());
        assert_eq!(files(&model.join("blobs"))[1], format!("{}.incomplete", hash(&weights())));
        let snapshot = fetch(&server.hub(), root.path()).unwrap();
        assert_eq!(fs::read(snapshot.join("model.safetensors")).unwrap(), weights());
        assert_eq!(server.logged("bytes=70000-"), 2 * (TRIES as usize + 1));
    }

    #[test]
    fn starts_again_where_the_server_cannot_resume() {
        let (server, root) = (Server::start(), tempfile::tempdir().unwrap());
        server.faults().cuts = vec![70_000];
        server.faults().no_ranges = true;
        let snapshot = fetch(&server.hub(), root.path()).unwrap();
        assert_eq!(fs::read(snapshot.join("model.safetensors")).unwrap(), weights());
    }

    #[test]
    fn one_altered_byte_is_refused_and_deleted() {
        let (server, root) = (Server::start(), tempfile::tempdir().unwrap());
        server.faults().altered = true;
        let error = format!("{:#}", fetch(&server.hub(), root.path()).unwrap_err());
        assert!(
            error.contains(&format!("the hub says 200000 bytes with {}; they were deleted", hash(&weights()))),
            "{error}"
        );
        let model = root.path().join("models--org--model");
        assert_eq!(files(&model.join("blobs")), ["230d5f4da0da586aad26ead694ea67cd15bd6df1"]); // config.json
        assert_eq!(files(&model.join("snapshots").join(REVISION)), ["config.json"]);
        server.faults().altered = false;
        fetch(&server.hub(), root.path()).unwrap();
    }

    #[test]
    fn a_partial_file_of_something_else_is_refused() {
        let (server, root) = (Server::start(), tempfile::tempdir().unwrap());
        let blobs = root.path().join("models--org--model/blobs");
        fs::create_dir_all(&blobs).unwrap();
        fs::write(blobs.join(format!("{}.incomplete", hash(&weights()))), [7; 1000]).unwrap();
        let error = format!("{:#}", fetch(&server.hub(), root.path()).unwrap_err());
        assert!(error.contains("they were deleted, try again"), "{error}");
        fetch(&server.hub(), root.path()).unwrap();
    }

    #[test]
    fn two_at_once_end_with_one_good_file() {
        let (server, root) = (Server::start(), tempfile::tempdir().unwrap());
        server.faults().cuts = vec![70_000];
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| fetch(&server.hub(), root.path()).unwrap());
            }
        });
        let model = root.path().join("models--org--model");
        assert_eq!(fs::read(model.join("snapshots").join(REVISION).join("model.safetensors")).unwrap(), weights());
        assert_eq!(files(&model.join("blobs")).len(), 2);
        assert_eq!(server.logged("GET /storage"), 2); // both of the one that came first
    }

    #[test]
    fn pickle_is_refused_with_advice() {
        let server = Server::start();
        server.faults().pickle = true;
        let error = server.hub().listing("org/model").unwrap_err().to_string();
        assert!(error.contains("org/model has its weights as pickle only (pytorch_model.bin)"), "{error}");
        assert!(error.contains("look for a version of the model in safetensors"), "{error}");
    }

    #[test]
    fn unreachable_and_unknown_are_told_apart() {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port(); // free again at once
        let error = format!("{:#}", hub(&format!("http://127.0.0.1:{port}/")).listing("org/model").unwrap_err());
        assert!(error.starts_with(&format!("cannot reach http://127.0.0.1:{port}: ")), "{error}");
        let error = format!("{:#}", Server::start().hub().listing("org/other").unwrap_err());
        assert!(error.contains("/api/models/org/other/revision/main answered 404"), "{error}");
    }

    #[test]
    fn only_what_loading_needs_is_wanted() {
        let files = [
            ".gitattributes",
            "README.md",
            "config.json",
            "generation_config.json",
            "chat_template.jinja",
            "merges.txt",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "consolidated.safetensors",
            "pytorch_model.bin",
            "tokenizer.model",
            "onnx/config.json",
            "modeling_x.py",
        ];
        assert_eq!(
            wanted("a/b", &files).unwrap(),
            [
                "config.json",
                "generation_config.json",
                "chat_template.jinja",
                "merges.txt",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
                "tokenizer.model",
            ]
        );
        assert_eq!(wanted("a/b", &["adapter_model.safetensors"]).unwrap(), ["adapter_model.safetensors"]);
        assert!(wanted("a/b", &["config.json"]).unwrap_err().to_string().contains("a/b has no safetensors file"));
    }
}
