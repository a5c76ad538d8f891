//! Client of the hub: lists a model's files and brings them into the cache, resumed where cut off and checked against the
//! hash that the hub states.

use std::{
    env,
    fs::{self, File},
    io::{Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Error, Result, anyhow, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;
use sha1::Sha1;
use sha2::{Digest, Sha256};
use ureq::{
    Agent, Body,
    config::RedirectAuthHeaders,
    http::{HeaderMap, Response, StatusCode},
    tls::{PemItem, RootCerts, TlsConfig, parse_pem},
};

use super::cache::{Cache, Repo};
use super::note;

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

/// What the hub says about one file.
#[derive(Debug)]
struct FileInfo {
    etag: String, // sha256, or git's sha1 of a small file; names the blob in the cache
    size: u64,
}

impl Hub {
    /// Reads `HF_ENDPOINT`, `HF_TOKEN`, proxies and certificates; an error where `HF_HUB_OFFLINE` forbids to ask the hub.
    pub(crate) fn from_env() -> Result<Self> {
        let var = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
        for name in ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"] {
            let value = var(name).unwrap_or_default().to_uppercase();
            ensure!(!["1", "ON", "YES", "TRUE"].contains(&value.as_str()), "{name} is set");
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

/// A file that is being filled, with the hash of what it has so far.
struct Partial<'a> {
    path: &'a Path,
    file: File,
    hash: Hash,
    len: u64,
    bar: ProgressBar,
}

impl<'a> Partial<'a> {
    fn open(path: &'a Path, info: &FileInfo, bar: ProgressBar) -> Result<Self> {
        let opened = path
            .parent()
            .map_or(Ok(()), fs::create_dir_all)
            .and_then(|()| File::options().create(true).truncate(false).read(true).write(true).open(path));
        let file = opened.with_context(|| format!("cannot open {}", path.display()))?;
        let mut partial = Self { path, file, hash: Hash::new(info), len: 0, bar };
        let mut buffer = vec![0; 1 << 16];
        loop {
            let count = partial.file.read(&mut buffer).with_context(|| format!("reading {}", path.display()))?;
            if count == 0 {
                break;
            }
            partial.hash.update(&buffer[..count]);
            partial.len += count as u64;
        }
        if partial.len > info.size {
            partial.hash = Hash::new(info);
            partial.restart()?;
        }
        partial.bar.set_position(partial.len);
        Ok(partial)
    }

    fn restart(&mut self) -> Result<()> {
        let emptied = self.file.set_len(0).and_then(|()| self.file.seek(SeekFrom::Start(0)));
        emptied.with_context(|| format!("cannot empty {}", self.path.display()))?;
        self.hash.reset();
        self.len = 0;
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).with_context(|| format!("writing {}", self.path.display()))?;
        self.hash.update(bytes);
        self.len += bytes.len() as u64;
        self.bar.set_position(self.len);
        Ok(())
    }

    fn finish(self, info: &FileInfo) -> Result<()> {
        self.bar.finish_and_clear();
        let found = self.hash.finish();
        if self.len != info.size || found != info.etag {
            fs::remove_file(self.path).with_context(|| format!("cannot delete {}", self.path.display()))?;
            bail!(
                "its {} bytes have the hash {found}, the hub says {} bytes with {}; they were deleted, try again",
                self.len,
                info.size,
                info.etag
            );
        }
        self.file.sync_all().with_context(|| format!("writing {}", self.path.display()))
    }
}

/// The hash that an etag states: sha256 of the bytes, or git's sha1, which hashes a header with the size first.
enum Hash {
    Sha256(Sha256),
    Git { sha1: Sha1, size: u64 },
}

impl Hash {
    fn new(info: &FileInfo) -> Self {
        let mut hash = match info.etag.len() {
            64 => Self::Sha256(Sha256::new()),
            _ => Self::Git { sha1: Sha1::new(), size: info.size },
        };
        hash.reset();
        hash
    }

    fn reset(&mut self) {
        match self {
            Self::Sha256(hash) => Digest::reset(hash),
            Self::Git { sha1, size } => *sha1 = Sha1::new_with_prefix(format!("blob {size}\0")),
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hash) => hash.update(bytes),
            Self::Git { sha1, .. } => sha1.update(bytes),
        }
    }

    fn finish(self) -> String {
        match self {
            Self::Sha256(hash) => format!("{:x}", hash.finalize()),
            Self::Git { sha1, .. } => format!("{:x}", sha1.finalize()),
        }
    }
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
