//! Pictures from other hosts: only from those that were named, never from this machine or a private network.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use thiserror::Error;
use ureq::Agent;
use ureq::http::Uri;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{DefaultConnector, NextTimeout};

/// Bytes of a picture's file.
const MAX_FILE: u64 = 20 << 20;
/// From the name's resolution to the last byte.
const TIME: Duration = Duration::from_secs(10);

/// Why a picture was not fetched. No address is told, nor what lies behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub(crate) enum FetchError {
    #[error("pictures are taken as base64 in a `data:` address alone; the server fetches none")]
    Off,
    #[error("the picture's address is neither `data:`, http nor https, or it cannot be read")]
    Address,
    #[error("the server fetches no pictures from this host")]
    Host,
    #[error("the picture could not be fetched")]
    Failed,
    #[error("the picture's host did not answer with a picture; redirects are not followed")]
    Status,
    #[error("the picture's file is larger than {} MiB", MAX_FILE >> 20)]
    TooLarge,
}

/// Fetches pictures.
#[derive(Debug)]
pub(crate) struct Fetcher {
    hosts: Vec<String>, // `host`, or `host:port`
    agent: Agent,
}

impl Fetcher {
    /// A fetcher from these hosts; one without a port may be asked at the usual ports.
    pub(crate) fn new(hosts: &[String]) -> Self {
        Self::with_check(hosts, is_public)
    }

    fn with_check(hosts: &[String], is_allowed: fn(IpAddr) -> bool) -> Self {
        let config = Agent::config_builder()
            .proxy(None) // a proxy would look the name up once more, and elsewhere
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .max_idle_connections(0)
            .timeout_global(Some(TIME))
            .user_agent(concat!("vora-serve/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .build();
        let resolver = Checked { inner: DefaultResolver::default(), is_allowed };
        let agent = Agent::with_parts(config, DefaultConnector::default(), resolver);
        Self { hosts: hosts.iter().map(|host| host.to_ascii_lowercase()).collect(), agent }
    }

    /// The bytes at an address.
    ///
    /// # Errors
    /// A host that is not among those that were named, or whose address is not of the public network; whatever else keeps a
    /// file of some size from coming in time.
    pub(crate) fn fetch(&self, url: &str) -> Result<Vec<u8>, FetchError> {
        if self.hosts.is_empty() {
            return Err(FetchError::Off);
        }
        let uri: Uri = url.parse().map_err(|_| FetchError::Address)?;
        let usual = match uri.scheme_str() {
            Some("http") => 80,
            Some("https") => 443,
            _ => return Err(FetchError::Address),
        };
        let authority = uri.authority().ok_or(FetchError::Address)?;
        if authority.as_str().contains('@') {
            return Err(FetchError::Address);
        }
        let (host, port) = (authority.host().to_ascii_lowercase(), authority.port_u16().unwrap_or(usual));
        let with_port = format!("{host}:{port}");
        if !self.hosts.iter().any(|known| *known == with_port || (*known == host && port == usual)) {
            return Err(FetchError::Host);
        }
        let mut response = self.agent.get(uri).call().map_err(|error| {
            tracing::info!("a picture was not fetched: {error}");
            FetchError::Failed
        })?;
        if response.status() != 200 {
            return Err(FetchError::Status);
        }
        response.body_mut().with_config().limit(MAX_FILE).read_to_vec().map_err(|error| match error {
            ureq::Error::BodyExceedsLimit(_) => FetchError::TooLarge,
            _ => FetchError::Failed,
        })
    }
}

/// Resolves a name once; what is connected to are the addresses that were looked at here.
#[derive(Debug)]
struct Checked {
    inner: DefaultResolver,
    is_allowed: fn(IpAddr) -> bool,
}

impl Resolver for Checked {
    fn resolve(
        &self,
        uri: &Uri,
        config: &ureq::config::Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let found = self.inner.resolve(uri, config, timeout)?;
        // A name with one private address is refused whole: nobody chooses which of them is taken.
        if found.iter().all(|address| (self.is_allowed)(address.ip())) {
            Ok(found)
        } else {
            Err(ureq::Error::HostNotFound)
        }
    }
}

/// Whether an address is one of the public network, by IANA's registries of special addresses.
pub(crate) fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => is_public_v6(address),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    !matches!(
        address.octets(),
        [0 | 10 | 127 | 224.., ..]
            | [100, 64..=127, ..]
            | [169, 254, ..]
            | [172, 16..=31, ..]
            | [192, 168, ..]
            | [192, 0, 0 | 2, _]
            | [192, 88, 99, _]
            | [198, 18 | 19, ..]
            | [198, 51, 100, _]
            | [203, 0, 113, _]
    )
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    match address.segments() {
        // Global unicast without what carries an IPv4 address in it (Teredo, 6to4), tests and documentation.
        [0x2001, 0..=0x1ff, ..] | [0x2001, 0xdb8, ..] | [0x2002, ..] | [0x3fff, 0..=0xfff, ..] => false,
        [0x2000..=0x3fff, ..] => true,
        // `::ffff:a.b.c.d` and everything else; a mapped address could be asked for as IPv4.
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn only_the_public_network_is_public() {
        for private in [
            "127.0.0.1",
            "10.1.2.3",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.0.1",
            "169.254.169.254",
            "0.0.0.0",
            "100.64.0.1",
            "192.0.0.1",
            "198.18.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "::1",
            "::",
            "fe80::1",
            "fc00::1",
            "fd00::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "::127.0.0.1",
            "64:ff9b::7f00:1",
            "2002:7f00:1::",
            "2001:0:7f00:1::",
            "ff02::1",
            "2001:db8::1",
        ] {
            assert!(!is_public(private.parse().unwrap()), "{private}");
        }
        for public in ["1.1.1.1", "172.32.0.1", "192.169.0.1", "100.128.0.1", "2606:4700::1111", "2a00:1450::1"] {
            assert!(is_public(public.parse().unwrap()), "{public}");
        }
    }

    /// What a host answers to one request, which it also gives back.
    fn host(answer: &'static [u8]) -> (u16, std::thread::JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let thread = std::thread::spawn(move || {
            let (mut socket, _) = listener.accept().unwrap();
            let mut request = [0; 4096];
            let read = socket.read(&mut request).unwrap();
            socket.write_all(answer).unwrap();
            String::from_utf8_lossy(&request[..read]).into_owned()
        });
        (port, thread)
    }

    #[test]
    fn a_named_host_is_asked() {
        let (port, asked) = host(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nbytes");
        let fetcher = Fetcher::with_check(&[format!("LOCALHOST:{port}")], |_| true);
        assert_eq!(fetcher.fetch(&format!("http://localhost:{port}/a.png")).unwrap(), b"bytes");
        assert!(asked.join().unwrap().starts_with("GET /a.png"));
    }

    #[test]
    fn a_redirect_is_not_followed() {
        let (port, asked) =
            host(b"HTTP/1.1 302 Found\r\nlocation: http://169.254.169.254/\r\ncontent-length: 0\r\n\r\n");
        let fetcher = Fetcher::with_check(&[format!("localhost:{port}")], |_| true);
        assert_eq!(fetcher.fetch(&format!("http://localhost:{port}/")), Err(FetchError::Status));
        asked.join().unwrap();
    }

    #[test]
    fn a_large_file_is_left() {
        let (port, asked) = host(b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999\r\n\r\nbytes");
        let fetcher = Fetcher::with_check(&[format!("localhost:{port}")], |_| true);
        let error = fetcher.fetch(&format!("http://localhost:{port}/")).unwrap_err();
        assert!(matches!(error, FetchError::TooLarge | FetchError::Failed), "{error}");
        asked.join().unwrap();
    }

    #[test]
    fn nothing_else_is_asked() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let port = listener.local_addr().unwrap().port();
        let hosts = ["localhost", "127.0.0.1", "[::ffff:127.0.0.1]", "[::1]"].map(|host| format!("{host}:{port}"));
        // Hosts that were named, and whose addresses are private; then hosts that were not.
        let fetcher = Fetcher::new(&hosts);
        for host in &hosts {
            assert_eq!(fetcher.fetch(&format!("http://{host}/")), Err(FetchError::Failed), "{host}");
        }
        let fetcher = Fetcher::new(&["pictures.example".to_owned()]);
        for (url, error) in [
            (format!("http://127.0.0.1:{port}/"), FetchError::Host),
            (format!("http://pictures.example:{port}/"), FetchError::Host),
            (format!("http://pictures.example@127.0.0.1:{port}/"), FetchError::Address),
            (format!("http://127.0.0.1:{port}#@pictures.example/"), FetchError::Host),
            (format!("http://127.0.0.1:{port}\\@pictures.example/"), FetchError::Address),
            ("file:///etc/passwd".to_owned(), FetchError::Address),
            ("gopher://pictures.example/".to_owned(), FetchError::Address),
            ("/etc/passwd".to_owned(), FetchError::Address),
        ] {
            assert_eq!(fetcher.fetch(&url), Err(error), "{url}");
        }
        assert_eq!(Fetcher::new(&[]).fetch("http://pictures.example/"), Err(FetchError::Off));
        assert_eq!(listener.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    }
}
