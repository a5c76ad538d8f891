//! Client of the hub: lists a model's files and brings them into the cache, resumed where cut off and checked against the
//! hash that the hub states.

use std::{
    env, fmt, fs,
    io::Read,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Error, Result, anyhow, bail, ensure};
use ureq::{
    Agent, Body,
    config::RedirectAuthHeaders,
    http::{HeaderMap, Response, StatusCode},
    tls::{PemItem, RootCerts, TlsConfig, parse_pem},
};

use crate::listing::is_hex;
use crate::partial::{FileInfo, Partial};
use crate::{Cache, HubError, Listing, Progress, Repo, cache, environment};

const TRIES: u32 = 5; // in a row without one byte gained
const LONGEST_LISTING: u64 = 32 << 20; // bytes

/// Asks the hub, or a mirror of it.
pub struct Client {
    endpoint: String,
    token: Option<String>,
    agent: Agent,
    pause: Duration, // before another try
}

impl fmt::Debug for Client {
    /// Leaves the token out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

impl Client {
    /// Reads `HF_ENDPOINT`, `HF_TOKEN`, proxies and certificates.
    ///
    /// # Errors
    /// [`HubError::Offline`] where `HF_HUB_OFFLINE` forbids to ask the hub; certificates that cannot be read.
    pub fn from_env() -> Result<Self> {
        let settings = environment::settings(|name| env::var_os(name))?;
        let mut config = Agent::config_builder();
        if let Some(path) = &settings.certificates {
            let pem = fs::read(path).with_context(|| format!("reading certificates from {path}"))?;
            let certificates: Vec<_> = parse_pem(&pem)
                .filter_map(
                    |item| if let Ok(PemItem::Certificate(certificate)) = item { Some(certificate) } else { None },
                )
                .collect();
            ensure!(!certificates.is_empty(), "{path} has no certificate in it");
            config =
                config.tls_config(TlsConfig::builder().root_certs(RootCerts::new_with_certs(&certificates)).build());
        }
        Ok(Self::new(settings.endpoint, settings.token, config, Duration::from_secs(1)))
    }

    fn new(
        endpoint: String,
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
            .user_agent(concat!("vora-hub/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .build();
        Self { endpoint, token, agent: config.into(), pause }
    }

    /// Asks which files model `name` has at `revision`, a branch, a tag or a commit, and keeps those that loading it needs.
    ///
    /// # Errors
    /// [`HubError::Name`], [`HubError::Unreachable`], [`HubError::NotFound`], [`HubError::Unauthorized`]; where the answer
    /// makes no sense, and where the model has no safetensors.
    pub fn listing(&self, name: &str, revision: &str) -> Result<Listing> {
        cache::check_name(name)?;
        ensure!(cache::is_revision(revision), "`{revision}` is not a model's revision: a branch, a tag or a commit");
        let url = format!("{}/api/models/{name}/revision/{}", self.endpoint, revision.replace('/', "%2F"));
        let mut response = self.get(&url, 0).map_err(|error| unreachable(&self.endpoint, error))?;
        check_status(&response, &url)?;
        let text = response.body_mut().with_config().limit(LONGEST_LISTING).read_to_string();
        let text = text.with_context(|| format!("reading {url}"))?;
        Listing::parse(name, revision, &url, &text)
    }

    /// Brings all listed files into the cache and gives the snapshot's folder; what is there already is kept.
    ///
    /// # Errors
    /// Those of [`Client::listing`]; [`HubError::Incomplete`] where the connection breaks again and again; a file with
    /// another hash than the hub's; a cache that cannot be written.
    pub fn fetch(&self, cache: &Cache, listing: &Listing, progress: &mut dyn Progress) -> Result<PathBuf> {
        let repo = cache.repo(&listing.name)?;
        for file in &listing.files {
            self.fetch_file(&repo, listing, file, progress)
                .with_context(|| format!("fetching {file} of {}", listing.name))?;
        }
        if listing.revision != listing.commit {
            repo.set_commit(&listing.revision, &listing.commit)?;
        }
        Ok(repo.snapshot(&listing.commit))
    }

    fn fetch_file(&self, repo: &Repo, listing: &Listing, file: &str, progress: &mut dyn Progress) -> Result<()> {
        let url = format!("{}/{}/resolve/{}/{file}", self.endpoint, listing.name, listing.commit);
        let info = self.info(&url)?;
        let blob = repo.blob(&info.etag);
        let _lock = repo.lock(&info.etag)?;
        if fs::metadata(&blob).map(|blob| blob.len()).ok() != Some(info.size) {
            let partial = blob.with_file_name(format!("{}.incomplete", info.etag));
            progress.begin(file, info.size);
            self.download(&url, &info, &partial, progress)?;
            fs::rename(&partial, &blob).with_context(|| format!("cannot move {file} to {}", blob.display()))?;
        }
        repo.link(&listing.commit, file, &info.etag)
    }

    /// Asks for hash and size of the file at `url`; a redirect within the hub is followed, one to its storage is not,
    /// since the answer before it has both.
    fn info(&self, url: &str) -> Result<FileInfo> {
        let mut at = url.to_owned();
        for _ in 0..5 {
            let request = self.agent.head(&at).config().max_redirects(0).max_redirects_will_error(false).build();
            let response = self.authorize(request).call().map_err(|error| unreachable(&at, error))?;
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
    fn download(&self, url: &str, info: &FileInfo, partial: &Path, progress: &mut dyn Progress) -> Result<()> {
        let mut partial = Partial::open(partial, info, progress)?;
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
                return Err(HubError::Incomplete { kept: partial.len, size: info.size, source: cut.into() }.into());
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

fn unreachable(url: &str, error: ureq::Error) -> HubError {
    HubError::Unreachable { url: url.into(), source: error.into() }
}

fn check_status(response: &Response<Body>, url: &str) -> Result<()> {
    let (status, url) = (response.status(), url.to_owned());
    match status {
        _ if status.is_success() => Ok(()),
        StatusCode::NOT_FOUND => Err(HubError::NotFound { url }.into()),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            Err(HubError::Unauthorized { url, status: status.to_string() }.into())
        }
        _ => bail!("{url} answered {status}"),
    }
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MAIN;
    use std::{
        io::{BufRead, BufReader, Write},
        net::{TcpListener, TcpStream},
        sync::{Arc, Mutex},
        thread,
    };

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

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

        fn client(&self) -> Client {
            client(&self.endpoint)
        }

        fn faults(&self) -> std::sync::MutexGuard<'_, Faults> {
            self.faults.lock().unwrap()
        }

        fn logged(&self, part: &str) -> usize {
            self.faults().log.iter().filter(|line| line.contains(part)).count()
        }
    }

    fn client(endpoint: &str) -> Client {
        let config = Agent::config_builder().proxy(None);
        Client::new(endpoint.into(), Some("secret".into()), config, Duration::from_millis(1))
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
            _ if path.starts_with("/api/models/org/gated/") => ("401 Unauthorized\r\n".into(), vec![]),
            _ if path.starts_with("/api/models/org/model/revision/") && faults.pickle => {
                ("200 OK\r\n".into(), json(&["config.json", "pytorch_model.bin"]))
            }
            _ if path.starts_with("/api/models/org/model/revision/") => (
                "200 OK\r\n".into(),
                json(&["README.md", "config.json", "model.safetensors", "onnx/model.onnx", "../x.json"]),
            ),
            _ if path == format!("/org/model/resolve/{COMMIT}/config.json") => {
                ("307 Temporary Redirect\r\nLocation: /cache/config.json\r\n".into(), vec![])
            }
            "/cache/config.json" => {
                ("200 OK\r\nETag: \"230d5f4da0da586aad26ead694ea67cd15bd6df1\"\r\n".into(), config.to_vec())
            }
            _ if path == format!("/org/model/resolve/{COMMIT}/model.safetensors") => {
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
        serde_json::json!({ "sha": COMMIT, "siblings": files }).to_string().into()
    }

    fn hash(bytes: &[u8]) -> String {
        use sha2::Digest;
        format!("{:x}", sha2::Sha256::digest(bytes))
    }

    fn fetch(client: &Client, root: &Path) -> Result<PathBuf> {
        client.fetch(&Cache::at(root), &client.listing("org/model", MAIN)?, &mut ())
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
        let snapshot = fetch(&server.client(), root.path()).unwrap();
        let model = root.path().join("models--org--model");
        assert_eq!(snapshot, model.join("snapshots").join(COMMIT));
        assert_eq!(files(&snapshot), ["config.json", "model.safetensors"]);
        assert_eq!(
            files(&model.join("blobs")),
            ["230d5f4da0da586aad26ead694ea67cd15bd6df1".to_owned(), hash(&weights())]
        );
        assert_eq!(fs::read(snapshot.join("model.safetensors")).unwrap(), weights());
        assert_eq!(fs::read_to_string(model.join("refs/main")).unwrap(), COMMIT);
        #[cfg(unix)]
        assert_eq!(
            fs::read_link(snapshot.join("model.safetensors")).unwrap(),
            Path::new("../../blobs").join(hash(&weights()))
        );
        assert_eq!(Cache::at(root.path()).repo("org/model").unwrap().commit(MAIN).as_deref(), Some(COMMIT));
        // The token goes to the hub and not to its storage.
        assert_eq!((server.logged("GET /storage HTTP/1.1  "), server.logged("GET /storage HTTP/1.1  bearer")), (1, 0));
        assert_eq!(server.logged("/api/models/org/model/revision/main HTTP/1.1  bearer secret"), 1);
        // Nothing is fetched twice.
        fetch(&server.client(), root.path()).unwrap();
        assert_eq!(server.logged("GET /storage"), 1);
    }

    #[test]
    fn goes_on_where_the_connection_broke() {
        let (server, root) = (Server::start(), tempfile::tempdir().unwrap());
        server.faults().cuts = vec![70_000, 0, 60_000];
        let snapshot = fetch(&server.client(), root.path()).unwrap();
        assert_eq!(fs::read(snapshot.join("model.safetensors")).unwrap(), weights());
        assert_eq!(server.logged("GET /storage"), 4);
        assert_eq!(server.logged("bytes=70000-"), 2 * 2); // asked of the hub and of its storage
        assert_eq!(server.logged("bytes=130000-"), 2);
    }

    #[test]
    fn goes_on_where_an_earlier_run_stopped() {
        let (server, root) = (Server::start(), tempfile::tempdir().unwrap());
        server.faults().cuts = [&[70_000][..], &[0; TRIES as usize]].concat();
        let error = fetch(&server.client(), root.path()).unwrap_err();
        assert!(matches!(error.downcast_ref(), Some(HubError::Incomplete { kept: 70_000, size: 200_000, .. })));
        let error = format!("{error:#}");
        assert!(error.contains("fetching model.safetensors of org/model: 70000 of 200000 bytes are kept"), "{error}");
        assert!(error.contains("the same command goes on from there: "), "{error}");
        let model = root.path().join("models--org--model");
        assert!(!model.join("refs/main").exists());
        assert_eq!(files(&model.join("blobs"))[1], format!("{}.incomplete", hash(&weights())));
        let snapshot = fetch(&server.client(), root.path()).unwrap();
        assert_eq!(fs::read(snapshot.join("model.safetensors")).unwrap(), weights());
        assert_eq!(server.logged("bytes=70000-"), 2 * (TRIES as usize + 1));
    }

    #[test]
    fn starts_again_where_the_server_cannot_resume() {
        let (server, root) = (Server::start(), tempfile::tempdir().unwrap());
        server.faults().cuts = vec![70_000];
        server.faults().no_ranges = true;
        let snapshot = fetch(&server.client(), root.path()).unwrap();
        assert_eq!(fs::read(snapshot.join("model.safetensors")).unwrap(), weights());
    }

    #[test]
    fn one_altered_byte_is_refused_and_deleted() {
        let (server, root) = (Server::start(), tempfile::tempdir().unwrap());
        server.faults().altered = true;
        let error = format!("{:#}", fetch(&server.client(), root.path()).unwrap_err());
        assert!(
            error.contains(&format!("the hub says 200000 bytes with {}; they were deleted", hash(&weights()))),
            "{error}"
        );
        let model = root.path().join("models--org--model");
        assert_eq!(files(&model.join("blobs")), ["230d5f4da0da586aad26ead694ea67cd15bd6df1"]); // config.json
        assert_eq!(files(&model.join("snapshots").join(COMMIT)), ["config.json"]);
        server.faults().altered = false;
        fetch(&server.client(), root.path()).unwrap();
    }

    #[test]
    fn a_partial_file_of_something_else_is_refused() {
        let (server, root) = (Server::start(), tempfile::tempdir().unwrap());
        let blobs = root.path().join("models--org--model/blobs");
        fs::create_dir_all(&blobs).unwrap();
        fs::write(blobs.join(format!("{}.incomplete", hash(&weights()))), [7; 1000]).unwrap();
        let error = format!("{:#}", fetch(&server.client(), root.path()).unwrap_err());
        assert!(error.contains("they were deleted, try again"), "{error}");
        fetch(&server.client(), root.path()).unwrap();
    }

    #[test]
    fn two_at_once_end_with_one_good_file() {
        let (server, root) = (Server::start(), tempfile::tempdir().unwrap());
        server.faults().cuts = vec![70_000];
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| fetch(&server.client(), root.path()).unwrap());
            }
        });
        let model = root.path().join("models--org--model");
        assert_eq!(fs::read(model.join("snapshots").join(COMMIT).join("model.safetensors")).unwrap(), weights());
        assert_eq!(files(&model.join("blobs")).len(), 2);
        assert_eq!(server.logged("GET /storage"), 2); // both of the one that came first
    }

    #[test]
    fn pickle_is_refused_with_advice() {
        let server = Server::start();
        server.faults().pickle = true;
        let error = server.client().listing("org/model", MAIN).unwrap_err().to_string();
        assert!(error.contains("org/model has its weights as pickle only (pytorch_model.bin)"), "{error}");
        assert!(error.contains("look for a version of the model in safetensors"), "{error}");
    }

    #[test]
    fn why_a_model_cannot_be_had_is_told_apart() {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port(); // free again at once
        let error = client(&format!("http://127.0.0.1:{port}")).listing("org/model", MAIN).unwrap_err();
        assert!(matches!(error.downcast_ref(), Some(HubError::Unreachable { .. })), "{error:#}");
        assert!(format!("{error:#}").starts_with(&format!("cannot reach http://127.0.0.1:{port}: ")), "{error:#}");
        let client = Server::start().client();
        let error = client.listing("org/other", MAIN).unwrap_err();
        assert!(matches!(error.downcast_ref(), Some(HubError::NotFound { .. })), "{error:#}");
        assert!(error.to_string().ends_with("/api/models/org/other/revision/main answered 404 Not Found"), "{error:#}");
        let error = client.listing("org/gated", MAIN).unwrap_err();
        assert!(matches!(error.downcast_ref(), Some(HubError::Unauthorized { .. })), "{error:#}");
        assert!(
            error.to_string().ends_with("401 Unauthorized: is the name right, and does HF_TOKEN give access to it?")
        );
        let error = client.listing("org/model", "../main").unwrap_err().to_string();
        assert!(error.contains("`../main` is not a model's revision"), "{error}");
        let error = client.listing("../model", MAIN).unwrap_err();
        assert!(matches!(error.downcast_ref(), Some(HubError::Name(_))), "{error:#}");
    }

    #[test]
    fn a_revision_is_found_again_by_its_name() {
        let (server, root) = (Server::start(), tempfile::tempdir().unwrap());
        let (client, cache) = (server.client(), Cache::at(root.path()));
        for revision in ["refs/pr/1", COMMIT] {
            client.fetch(&cache, &client.listing("org/model", revision).unwrap(), &mut ()).unwrap();
        }
        assert_eq!(server.logged("/api/models/org/model/revision/refs%2Fpr%2F1 HTTP"), 1);
        let repo = cache.repo("org/model").unwrap();
        for revision in ["refs/pr/1", COMMIT] {
            assert_eq!(repo.complete(revision, &[]), Some(repo.snapshot(COMMIT)));
        }
        assert_eq!(repo.commit(MAIN), None);
        assert_eq!(files(&repo.folder().join("refs")), ["refs"]); // a commit needs no name
    }

    #[test]
    fn progress_tells_of_each_file() {
        #[derive(Default)]
        struct Log(Vec<String>, u64);
        impl Progress for Log {
            fn begin(&mut self, file: &str, size: u64) {
                self.0.push(format!("{file} {size}"));
            }
            fn advance(&mut self, len: u64) {
                self.1 = len;
            }
            fn end(&mut self) {
                self.0.push(format!("{} came", self.1));
            }
        }
        let (server, root) = (Server::start(), tempfile::tempdir().unwrap());
        server.faults().cuts = vec![70_000];
        let (client, mut log) = (server.client(), Log::default());
        let listing = client.listing("org/model", MAIN).unwrap();
        for _ in 0..2 {
            client.fetch(&Cache::at(root.path()), &listing, &mut log).unwrap();
            assert_eq!(log.0, ["config.json 23", "23 came", "model.safetensors 200000", "200000 came"]);
        }
    }

    #[test]
    fn the_token_is_not_shown() {
        assert_eq!(format!("{:?}", client("http://a")), "Client { endpoint: \"http://a\", .. }");
    }
}
