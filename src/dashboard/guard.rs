//! Which requests may pass: those for this server, from its own page, with the token if one is needed. Pure.
//!
//! A page of another site that is open in the same browser can send requests to this server, and so can a site
//! whose name it lets point to this address (DNS rebinding). So the name in `Host` must be one that no stranger
//! can own. A request that changes something must come from our own page, and must have a header that a
//! page of another site cannot send without asking first; nobody answers that question.

use std::net::IpAddr;

use axum::http::header::{AUTHORIZATION, CONTENT_TYPE, HOST, ORIGIN};
use axum::http::{HeaderMap, Method, StatusCode};
use ps_actors::net::Token;
use subtle::ConstantTimeEq as _;

/// The header that every request that changes something must have.
pub(super) const CUSTOM: &str = "x-ps-dashboard";

/// Decides about requests.
#[derive(Debug)]
pub(super) struct Guard {
    /// Names of this host that `Host` may have, besides addresses and `localhost`.
    pub(super) names: Vec<String>,
    pub(super) token: Option<Token>,
    /// Whether reading needs the token, too.
    pub(super) reads_need_token: bool,
}

/// Why a request was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) status: StatusCode,
    pub(super) text: String,
}

fn refuse<T>(status: StatusCode, text: impl Into<String>) -> Result<T, Refused> {
    let text = text.into();
    Err(Refused { status, text })
}

impl Guard {
    /// Checks a request for a file of the page, which everybody may have who may ask this server.
    pub(super) fn check_page(&self, headers: &HeaderMap) -> Result<(), Refused> {
        self.host(headers).map(|_| ())
    }

    /// Checks a request that only reads.
    pub(super) fn check_read(&self, headers: &HeaderMap) -> Result<(), Refused> {
        let host = self.host(headers)?;
        check_site(headers, host, &["same-origin", "none"])?;
        match self.reads_need_token {
            true => self.check_token(headers),
            false => Ok(()),
        }
    }

    /// Checks a request that changes something.
    pub(super) fn check_change(&self, headers: &HeaderMap) -> Result<(), Refused> {
        let host = self.host(headers)?;
        check_site(headers, host, &["same-origin"])?;
        if headers.get(CUSTOM).is_none_or(|value| value != "1") {
            return refuse(
                StatusCode::FORBIDDEN,
                format!("a request that changes something needs the header `{CUSTOM}: 1`"),
            );
        }
        let is_json = headers
            .get(CONTENT_TYPE)
            .and_then(|kind| kind.to_str().ok())
            .is_some_and(|kind| {
                let kind = kind.split(';').next().unwrap_or_default();
                kind.trim().eq_ignore_ascii_case("application/json")
            });
        if !is_json {
            return refuse(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "the body must be JSON, with `content-type: application/json`",
            );
        }
        if self.token.is_none() {
            return refuse(
                StatusCode::FORBIDDEN,
                "this dashboard is read-only: start the training with --dashboard-token-file, or with \
                 PS_DASHBOARD_TOKEN in its environment, to control it",
            );
        }
        self.check_token(headers)
    }

    /// Returns the host that the request is for, with its port.
    fn host<'a>(&self, headers: &'a HeaderMap) -> Result<&'a str, Refused> {
        let mut hosts = headers.get_all(HOST).iter();
        let (Some(host), None) = (
            hosts.next().and_then(|host| host.to_str().ok()),
            hosts.next(),
        ) else {
            return refuse(
                StatusCode::BAD_REQUEST,
                "a request must have one header `Host`",
            );
        };
        let name = name_of(host);
        let is_known = name.eq_ignore_ascii_case("localhost")
            || name.parse::<IpAddr>().is_ok()
            || self
                .names
                .iter()
                .any(|known| known.eq_ignore_ascii_case(name));
        if is_known {
            return Ok(host);
        }
        refuse(
            StatusCode::MISDIRECTED_REQUEST,
            format!(
                "this dashboard does not answer to the name {name:?}: use its address, or name it with \
                 --dashboard-host"
            ),
        )
    }

    fn check_token(&self, headers: &HeaderMap) -> Result<(), Refused> {
        let Some(token) = &self.token else {
            return Ok(());
        };
        let given = headers.get(AUTHORIZATION).map(|given| given.as_bytes());
        let Some(given) = given.and_then(|given| given.strip_prefix(b"Bearer ")) else {
            return refuse(
                StatusCode::UNAUTHORIZED,
                "this needs the dashboard's token: `authorization: Bearer …`",
            );
        };
        match bool::from(token.reveal().as_bytes().ct_eq(given)) {
            true => Ok(()),
            false => refuse(
                StatusCode::UNAUTHORIZED,
                "this is not the dashboard's token",
            ),
        }
    }
}

/// Returns the host without its port. An IPv6 address is returned without its brackets.
fn name_of(host: &str) -> &str {
    if let Some(rest) = host.strip_prefix('[') {
        return rest.split_once(']').map_or(rest, |(address, _)| address);
    }
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    }
}

/// Refuses a request that a browser sends for a page of another site. Programs that are no browsers send none of
/// these headers.
fn check_site(headers: &HeaderMap, host: &str, sites: &[&str]) -> Result<(), Refused> {
    let from_elsewhere = "this request comes from a page of another site";
    for site in headers.get_all("sec-fetch-site") {
        if !sites.iter().any(|allowed| site == allowed) {
            return refuse(StatusCode::FORBIDDEN, from_elsewhere);
        }
    }
    for origin in headers.get_all(ORIGIN) {
        let origin = origin.to_str().unwrap_or_default();
        let authority = origin
            .strip_prefix("http://")
            .or_else(|| origin.strip_prefix("https://"));
        if authority.is_none_or(|authority| !authority.eq_ignore_ascii_case(host)) {
            return refuse(StatusCode::FORBIDDEN, from_elsewhere);
        }
    }
    Ok(())
}

/// What can be done at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Route {
    Page(&'static str),
    State,
    Events,
    Metrics,
    Change(Changing),
}

/// What a request changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Changing {
    Pause,
    Resume,
    Checkpoint,
    LearningRate,
    Consistency,
    RemoveWorker,
    End,
}

impl Route {
    /// Finds what a request is for.
    pub(super) fn of(method: &Method, path: &str) -> Result<Self, Refused> {
        let route = match path {
            "/" | "/index.html" => Self::Page("index.html"),
            "/dashboard.css" => Self::Page("dashboard.css"),
            "/dashboard.js" => Self::Page("dashboard.js"),
            "/charts.js" => Self::Page("charts.js"),
            "/icon.svg" => Self::Page("icon.svg"),
            "/api/state" => Self::State,
            "/api/events" => Self::Events,
            "/metrics" => Self::Metrics,
            "/api/pause" => Self::Change(Changing::Pause),
            "/api/resume" => Self::Change(Changing::Resume),
            "/api/checkpoint" => Self::Change(Changing::Checkpoint),
            "/api/learning-rate" => Self::Change(Changing::LearningRate),
            "/api/consistency" => Self::Change(Changing::Consistency),
            "/api/remove-worker" => Self::Change(Changing::RemoveWorker),
            "/api/end" => Self::Change(Changing::End),
            _ => return refuse(StatusCode::NOT_FOUND, "there is nothing at this path"),
        };
        let is_allowed = match route {
            Self::Change(_) => method == Method::POST,
            _ => method == Method::GET || method == Method::HEAD,
        };
        match is_allowed {
            true => Ok(route),
            false => refuse(
                StatusCode::METHOD_NOT_ALLOWED,
                format!("this path takes {}", route.method()),
            ),
        }
    }

    fn method(self) -> &'static str {
        match self {
            Self::Change(_) => "POST only",
            _ => "GET only",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::{HeaderName, HeaderValue};

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            let name: HeaderName = name.parse().unwrap();
            headers.append(name, value.parse::<HeaderValue>().unwrap());
        }
        headers
    }

    fn guard(token: Option<&str>) -> Guard {
        Guard {
            names: vec!["trainer.example".to_owned()],
            token: token.map(|token| Token::new(token).unwrap()),
            reads_need_token: false,
        }
    }

    fn status(result: Result<(), Refused>) -> u16 {
        result.map_or_else(|refused| refused.status.as_u16(), |()| 200)
    }

    #[test]
    fn only_names_that_no_stranger_can_own_are_answered() {
        let guard = guard(None);
        for (host, expected) in [
            ("127.0.0.1:8265", 200),
            ("localhost:8265", 200),
            ("LOCALHOST", 200),
            ("[::1]:8265", 200),
            ("10.0.0.7", 200),
            ("Trainer.Example:1", 200),
            ("evil.example", 421),
            ("localhost.evil.example:8265", 421),
            ("127.0.0.1.evil.example", 421),
            ("127.0.0.1@evil.example", 421),
            ("", 421),
        ] {
            let headers = headers(&[("host", host)]);
            assert_eq!(status(guard.check_page(&headers)), expected, "{host}");
            assert_eq!(status(guard.check_read(&headers)), expected, "{host}");
        }
        assert_eq!(status(guard.check_page(&HeaderMap::new())), 400);
        let two = headers(&[("host", "localhost"), ("host", "evil.example")]);
        assert_eq!(status(guard.check_page(&two)), 400);
    }

    const TOKEN: &str = "correct-horse-battery";
    const GOOD: [(&str, &str); 6] = [
        ("host", "127.0.0.1:8265"),
        ("origin", "http://127.0.0.1:8265"),
        ("sec-fetch-site", "same-origin"),
        (CUSTOM, "1"),
        ("content-type", "application/json; charset=utf-8"),
        ("authorization", "Bearer correct-horse-battery"),
    ];

    #[test]
    fn a_change_needs_our_own_page_and_the_token() {
        let guard = guard(Some(TOKEN));
        assert_eq!(status(guard.check_change(&headers(&GOOD))), 200);
        // Each of them with another value, and without it.
        for (name, value, expected) in [
            ("host", Some("evil.example"), 421),
            ("origin", Some("http://evil.example"), 403),
            ("origin", Some("null"), 403),
            ("origin", Some("http://127.0.0.1:9999"), 403),
            ("origin", None, 200),
            ("sec-fetch-site", Some("cross-site"), 403),
            ("sec-fetch-site", Some("same-site"), 403),
            ("sec-fetch-site", Some("none"), 403),
            ("sec-fetch-site", None, 200),
            (CUSTOM, None, 403),
            (CUSTOM, Some("2"), 403),
            ("content-type", Some("text/plain"), 415),
            (
                "content-type",
                Some("application/x-www-form-urlencoded"),
                415,
            ),
            ("content-type", None, 415),
            ("authorization", Some("Bearer correct-horse-batterz"), 401),
            ("authorization", Some("Bearer "), 401),
            ("authorization", Some("Basic correct-horse-battery"), 401),
            ("authorization", None, 401),
        ] {
            let changed = GOOD.iter().filter(|(other, _)| *other != name).copied();
            let changed: Vec<_> = changed.chain(value.map(|value| (name, value))).collect();
            let got = status(guard.check_change(&headers(&changed)));
            assert_eq!(got, expected, "{name}: {value:?}");
        }
    }

    #[test]
    fn without_a_token_nothing_can_be_changed() {
        let refused = guard(None).check_change(&headers(&GOOD)).unwrap_err();
        assert_eq!(refused.status, StatusCode::FORBIDDEN);
        assert!(refused.text.contains("read-only"), "{}", refused.text);
    }

    #[test]
    fn reading_needs_the_token_only_where_others_can_read() {
        let mut guard = guard(Some(TOKEN));
        let host = ("host", "10.0.0.7:8265");
        assert_eq!(status(guard.check_read(&headers(&[host]))), 200);
        assert_eq!(
            status(guard.check_read(&headers(&[host, ("sec-fetch-site", "cross-site")]))),
            403
        );
        guard.reads_need_token = true;
        assert_eq!(status(guard.check_read(&headers(&[host]))), 401);
        assert_eq!(status(guard.check_read(&headers(&[host, GOOD[5]]))), 200);
        assert_eq!(status(guard.check_page(&headers(&[host]))), 200);
    }

    #[test]
    fn every_path_has_one_method() {
        assert_eq!(Route::of(&Method::GET, "/"), Ok(Route::Page("index.html")));
        assert_eq!(
            Route::of(&Method::POST, "/api/pause"),
            Ok(Route::Change(Changing::Pause))
        );
        for (method, path, expected) in [
            (Method::GET, "/api/pause", 405),
            (Method::OPTIONS, "/api/pause", 405),
            (Method::POST, "/", 405),
            (Method::GET, "/../etc/passwd", 404),
            (Method::GET, "/api/", 404),
        ] {
            assert_eq!(
                Route::of(&method, path).unwrap_err().status.as_u16(),
                expected,
                "{method} {path}"
            );
        }
    }
}
