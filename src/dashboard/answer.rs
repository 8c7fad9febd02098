//! Answers requests: the page, the state, the stream of events, and changes.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::header::{
    ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, REFERRER_POLICY,
    RETRY_AFTER, WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
};
use axum::http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use futures_util::stream;
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use ps_actors::actor::error_chain;
use ps_actors::ids::WorkerId;
use ps_actors::server::Consistency;
use serde::Deserialize;
use tokio::sync::{OwnedSemaphorePermit, watch};

use super::guard::{Changing, Refused, Route};
use super::server::Deadline;
use super::shared::{Published, Shared};
use super::view::{Curves, Marks};
use crate::controls::ControlError;

/// How many bytes the body of a request may have.
const MAX_BODY: usize = 4 << 10;

/// How long a client may take to send a body, and how long a change may take.
const BODY: Duration = Duration::from_secs(5);
const CHANGE: Duration = Duration::from_secs(10);

/// Nothing is loaded from elsewhere, nothing inline is run, and no other page may show this one in a frame.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const EVENT_STREAM: &str = "text/event-stream";
const JSON: &str = "application/json";
const TEXT: &str = "text/plain; charset=utf-8";
/// The text format of Prometheus.
const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Answers a request. `deadline` is that of its connection.
pub(super) async fn answer(
    shared: &Arc<Shared>,
    deadline: Arc<Deadline>,
    request: Request<Incoming>,
) -> Response<Body> {
    let mut response = match route(shared, deadline, request).await {
        Ok(response) => response,
        Err(refused) => refusal(&refused),
    };
    let headers = response.headers_mut();
    for (name, value) in [
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (X_FRAME_OPTIONS, "DENY"),
        (REFERRER_POLICY, "no-referrer"),
        (CACHE_CONTROL, "no-store"),
        (
            HeaderName::from_static("cross-origin-resource-policy"),
            "same-origin",
        ),
        (
            HeaderName::from_static("cross-origin-opener-policy"),
            "same-origin",
        ),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

async fn route(
    shared: &Arc<Shared>,
    deadline: Arc<Deadline>,
    request: Request<Incoming>,
) -> Result<Response<Body>, Refused> {
    let guard = &shared.guard;
    if request.uri().authority().is_some() {
        let text = "this is no proxy".to_owned();
        return Err(Refused {
            status: StatusCode::BAD_REQUEST,
            text,
        });
    }
    // A stranger does not learn which paths there are.
    guard.check_page(request.headers())?;
    match Route::of(request.method(), request.uri().path())? {
        Route::Page(name) => Ok(page(name)),
        Route::State => {
            guard.check_read(request.headers())?;
            Ok(body(StatusCode::OK, JSON, whole_state(shared)))
        }
        Route::Events => {
            guard.check_read(request.headers())?;
            events(shared, deadline, request.headers())
        }
        Route::Metrics => {
            guard.check_read(request.headers())?;
            let metrics = shared.metrics.as_ref().ok_or_else(|| Refused {
                status: StatusCode::NOT_FOUND,
                text: "this training counts no metrics: its DashboardConfig has none".to_owned(),
            })?;
            Ok(body(StatusCode::OK, METRICS, metrics()))
        }
        Route::Change(changing) => {
            guard.check_change(request.headers())?;
            Ok(change(shared, changing, request).await)
        }
    }
}

fn body(status: StatusCode, kind: &'static str, text: impl Into<Body>) -> Response<Body> {
    let mut response = Response::new(text.into());
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

fn refusal(refused: &Refused) -> Response<Body> {
    let mut response = body(refused.status, TEXT, format!("{}\n", refused.text));
    let headers = response.headers_mut();
    match refused.status {
        StatusCode::UNAUTHORIZED => {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        StatusCode::METHOD_NOT_ALLOWED => {
            let allowed = match refused.text.contains("POST") {
                true => "POST",
                false => "GET, HEAD",
            };
            headers.insert(ALLOW, HeaderValue::from_static(allowed));
        }
        StatusCode::SERVICE_UNAVAILABLE => {
            headers.insert(RETRY_AFTER, HeaderValue::from_static("10"));
        }
        _ => {}
    }
    response
}

fn page(name: &str) -> Response<Body> {
    let (kind, text) = match name {
        "dashboard.css" => (
            "text/css; charset=utf-8",
            include_str!("page/dashboard.css"),
        ),
        "dashboard.js" => (
            "text/javascript; charset=utf-8",
            include_str!("page/dashboard.js"),
        ),
        "charts.js" => (
            "text/javascript; charset=utf-8",
            include_str!("page/charts.js"),
        ),
        "icon.svg" => ("image/svg+xml", include_str!("page/icon.svg")),
        _ => ("text/html; charset=utf-8", include_str!("page/index.html")),
    };
    body(StatusCode::OK, kind, text)
}

fn whole_state(shared: &Shared) -> String {
    let view = shared.view();
    part(shared, &view, Marks::default()).0
}

/// Writes the state and what is new of the curves. Returns what the client has then.
fn part(shared: &Shared, view: &str, marks: Marks) -> (String, Marks) {
    let state = shared.state();
    let (curves, marks) = Curves::since(&state, marks);
    // Nothing in it can fail to be written.
    let curves = serde_json::to_string(&curves).unwrap_or_default();
    drop(state);
    let run = &shared.run;
    (
        format!(r#"{{"run_id":"{run}","state":{view},"curves":{curves}}}"#),
        marks,
    )
}

/// A client that gets the state each time that there is a new one.
struct Client {
    shared: Arc<Shared>,
    deadline: Arc<Deadline>,
    latest: watch::Receiver<Published>,
    marks: Marks,
    is_first: bool,
    is_over: bool,
    _permit: OwnedSemaphorePermit,
}

fn events(
    shared: &Arc<Shared>,
    deadline: Arc<Deadline>,
    headers: &HeaderMap,
) -> Result<Response<Body>, Refused> {
    let Ok(permit) = Arc::clone(&shared.streams).try_acquire_owned() else {
        return Err(Refused {
            status: StatusCode::SERVICE_UNAVAILABLE,
            text: "too many browsers watch this training".to_owned(),
        });
    };
    let id = headers.get("last-event-id").and_then(|id| id.to_str().ok());
    let client = Client {
        marks: Marks::read(id.unwrap_or_default(), &shared.run),
        latest: shared.latest(),
        shared: Arc::clone(shared),
        deadline,
        is_first: true,
        is_over: false,
        _permit: permit,
    };
    // A part is made only when the one before is written. So a slow client gets fewer of them, and takes no
    // memory. One that takes none at all is dropped at its deadline.
    let parts = stream::unfold(client, |mut client| async move {
        let part = client.next().await?;
        Some((Ok::<_, std::convert::Infallible>(Bytes::from(part)), client))
    });
    Ok(body(StatusCode::OK, EVENT_STREAM, Body::from_stream(parts)))
}

impl Client {
    async fn next(&mut self) -> Option<String> {
        self.deadline.extend();
        if self.is_over {
            return None;
        }
        let view: Arc<str> = match std::mem::take(&mut self.is_first) {
            true => {
                self.latest.mark_unchanged();
                self.shared.view().into()
            }
            false => {
                self.latest.changed().await.ok()?;
                let latest = self.latest.borrow_and_update();
                self.is_over = latest.is_last;
                Arc::clone(&latest.view)
            }
        };
        self.deadline.extend();
        let (data, marks) = part(&self.shared, &view, self.marks);
        self.marks = marks;
        let id = marks.write(&self.shared.run);
        Some(format!(
            "retry: 2000\nid: {id}\nevent: update\ndata: {data}\n\n"
        ))
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LearningRate {
    learning_rate: f64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Mode {
    consistency: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Removed {
    worker: u32,
}

/// Why a change was not made.
enum NotDone {
    Body(String),
    Control(ControlError),
    Slow,
}

impl From<ControlError> for NotDone {
    fn from(error: ControlError) -> Self {
        Self::Control(error)
    }
}

async fn change(
    shared: &Arc<Shared>,
    changing: Changing,
    request: Request<Incoming>,
) -> Response<Body> {
    let (status, text) = match carry_out(shared, changing, request).await {
        Ok(text) => (StatusCode::OK, text),
        Err(NotDone::Body(text)) => (StatusCode::BAD_REQUEST, text),
        Err(NotDone::Slow) => (
            StatusCode::GATEWAY_TIMEOUT,
            "the training has not answered yet; it may still do this".to_owned(),
        ),
        Err(NotDone::Control(error)) => {
            let status = match error {
                ControlError::Consistency(_) | ControlError::NoSuchWorker(_) => {
                    StatusCode::BAD_REQUEST
                }
                ControlError::TooManyWaiting => StatusCode::SERVICE_UNAVAILABLE,
                _ => StatusCode::CONFLICT,
            };
            (status, error_chain(&error))
        }
    };
    let key = if status.is_success() { "done" } else { "error" };
    body(status, JSON, serde_json::json!({ key: text }).to_string())
}

async fn carry_out(
    shared: &Arc<Shared>,
    changing: Changing,
    request: Request<Incoming>,
) -> Result<String, NotDone> {
    let body = Limited::new(request.into_body(), MAX_BODY).collect();
    let body = match tokio::time::timeout(BODY, body).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(error)) => return Err(NotDone::Body(format!("the body was not read: {error}"))),
        Err(_) => return Err(NotDone::Body("the body came too slowly".to_owned())),
    };
    let controls = &shared.controls;
    let (asked, done) = match changing {
        Changing::Pause => (controls.pause(), "The training is paused.".to_owned()),
        Changing::Resume => (controls.resume(), "The training goes on.".to_owned()),
        Changing::Checkpoint => (
            controls.save_checkpoint(),
            "A checkpoint is being saved. It is listed when it is on the disk.".to_owned(),
        ),
        Changing::LearningRate => {
            let LearningRate { learning_rate } = read(&body)?;
            let done = format!("The learning rate is {learning_rate} from the next update on.");
            (controls.set_learning_rate(learning_rate), done)
        }
        Changing::Consistency => {
            let Mode { consistency } = read(&body)?;
            let consistency: Consistency = consistency
                .parse()
                .map_err(|error| NotDone::Body(format!("this is no consistency mode: {error}")))?;
            let done = format!("The consistency mode is {consistency} now.");
            (controls.set_consistency(consistency), done)
        }
        Changing::RemoveWorker => {
            let Removed { worker } = read(&body)?;
            let worker = WorkerId(worker);
            (
                controls.remove_worker(worker),
                format!("{worker} leaves after its step."),
            )
        }
        Changing::End => (
            controls.end(),
            "The training ends after the current steps.".to_owned(),
        ),
    };
    match tokio::time::timeout(CHANGE, asked).await {
        Ok(result) => result.map(|()| done).map_err(NotDone::from),
        Err(_) => Err(NotDone::Slow),
    }
}

fn read<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, NotDone> {
    serde_json::from_slice(body)
        .map_err(|error| NotDone::Body(format!("the body cannot be read: {error}")))
}
