//! One function per route. Each reads the request, asks the servers, and writes the reply.

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::{CONTENT_TYPE, ORIGIN};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::body::{self, Upload};
use super::headers::{
    CLOCK, Caller, EPOCH, INCARNATION, NUM_WEIGHTS, OUTCOME, STALENESS, Stamp, VERSION, newcomer,
    wanted_version,
};
use super::model::Model;
use super::problem::Problem;
use super::watch::{Seen, UnsettledPush};
use super::{Api, views};
use crate::server::Outcome;
use crate::weights::{Gradient, GradientUpdate, Weights};

type Answer = Result<Response, Problem>;

/// Refuses a request that a browser sends for a page. Workers are no pages, and send neither header.
pub(super) async fn refuse_pages(request: Request, next: Next) -> Answer {
    let headers = request.headers();
    let mut sites = headers.get_all("sec-fetch-site").iter();
    // `none`: somebody has typed the address.
    let is_of_page = sites.any(|site| site != "none");
    if headers.contains_key(ORIGIN) || is_of_page {
        let why = "this request comes from a page in a browser (it has the header origin or sec-fetch-site): only \
                   workers may send requests here";
        return Err(Problem::new(StatusCode::FORBIDDEN, why));
    }
    Ok(next.run(request).await)
}

pub(super) async fn join(State(api): State<Api>, headers: HeaderMap) -> Answer {
    let model = api.model()?;
    let (worker, request) = newcomer(&headers)?;
    let join = async {
        let num_weights = model.layout().await?.num_weights();
        Ok((num_weights, model.group.join(worker, request).await?))
    };
    let (num_weights, membership) = model.while_open(join).await?;
    api.shared.watcher.tell(|| Seen::Joined {
        worker,
        incarnation: membership.incarnation,
        clock: membership.next_clock,
        epoch: membership.epoch,
    });
    let headers = [
        (INCARNATION, membership.incarnation.0),
        (CLOCK, membership.next_clock.0),
        (VERSION, membership.version.0),
        (EPOCH, membership.epoch.0),
        (NUM_WEIGHTS, num_weights as u64),
    ];
    Ok(with(Body::empty(), headers))
}

pub(super) async fn leave(State(api): State<Api>, headers: HeaderMap) -> Answer {
    let model = api.model()?;
    let Caller {
        worker,
        incarnation,
    } = Caller::read(&headers)?;
    let leave = async { Ok(model.group.leave(worker, incarnation).await?) };
    model.while_open(leave).await?;
    api.shared.watcher.tell(|| Seen::Left {
        worker,
        incarnation,
    });
    Ok(Response::default())
}

pub(super) async fn heartbeat(State(api): State<Api>, headers: HeaderMap) -> Answer {
    let model = api.model()?;
    let Caller {
        worker,
        incarnation,
    } = Caller::read(&headers)?;
    let beat = async { Ok(model.group.heartbeat(worker, incarnation).await?) };
    model.while_open(beat).await?;
    Ok(Response::default())
}

pub(super) async fn layout(State(api): State<Api>) -> Answer {
    let model = api.model()?;
    let layout = async { Ok(views::layout(model.layout().await?)) };
    Ok(json(model.while_open(layout).await?))
}

pub(super) async fn weights(State(api): State<Api>, uri: Uri) -> Answer {
    let model = api.model()?;
    let wanted = wanted_version(uri.query())?;
    let weights = model.while_open(model.pull(wanted)).await?;
    Ok(with_weights(&weights))
}

pub(super) async fn status(State(api): State<Api>) -> Answer {
    let model = api.model()?;
    let status = async { Ok(views::status(&model.group.status().await?)) };
    Ok(json(model.while_open(status).await?))
}

pub(super) async fn push(State(api): State<Api>, request: Request) -> Answer {
    let model = api.model()?;
    let push = async {
        let gradients = receive(&api, &model, request).await?;
        let unsettled = UnsettledPush::of(&gradients);
        Ok((unsettled, model.group.push(gradients).await?))
    };
    let (push, outcome) = model.while_open(push).await?;
    api.shared.watcher.tell(|| push.settled(outcome));
    let mut response = with(Body::empty(), [(VERSION, outcome.version().0)]);
    add_outcome(&mut response, &outcome);
    Ok(response)
}

pub(super) async fn push_pull(State(api): State<Api>, request: Request) -> Answer {
    let model = api.model()?;
    let push = async {
        let gradients = receive(&api, &model, request).await?;
        let unsettled = UnsettledPush::of(&gradients);
        Ok((unsettled, model.group.push_pull(gradients).await?))
    };
    let (push, (outcome, weights)) = model.while_open(push).await?;
    api.shared.watcher.tell(|| push.settled(outcome));
    let mut response = with_weights(&weights);
    add_outcome(&mut response, &outcome);
    Ok(response)
}

/// Reads a push. The headers are checked first, so that the numbers of a wrong push are not even read.
async fn receive(api: &Api, model: &Model, request: Request) -> Result<GradientUpdate, Problem> {
    let Stamp {
        id,
        computed_on,
        loss,
        num_examples,
    } = Stamp::read(request.headers())?;
    let layout = model.layout().await?;
    let (len, num_trainable) = (layout.num_weights(), layout.num_trainable());
    let upload = Upload::new(request, len)?;
    // Only a member's gradient takes a place and memory.
    model.group.heartbeat(id.worker, id.incarnation).await?;
    let values = api.shared.uploads.receive(upload).await?;
    Ok(GradientUpdate {
        id,
        computed_on,
        loss,
        num_examples,
        gradient: Gradient::with_buffers(values, num_trainable),
    })
}

fn add_outcome(response: &mut Response, outcome: &Outcome) {
    let (name, staleness) = match *outcome {
        Outcome::Applied { staleness, .. } => ("applied", Some(staleness)),
        Outcome::DroppedLate { staleness, .. } => ("dropped-late", Some(staleness)),
        Outcome::RefusedNorm { .. } => ("refused-norm", None),
    };
    let headers = response.headers_mut();
    headers.insert(OUTCOME, HeaderValue::from_static(name));
    if let Some(staleness) = staleness {
        headers.insert(STALENESS, staleness.into());
    }
}

fn with(body: Body, headers: impl IntoIterator<Item = (&'static str, u64)>) -> Response {
    let mut response = Response::new(body);
    for (name, value) in headers {
        let name = HeaderName::from_static(name);
        response.headers_mut().insert(name, value.into());
    }
    response
}

fn with_weights(weights: &Weights) -> Response {
    let version = (VERSION, weights.version().0);
    let mut response = with(body::of_weights(weights), [version]);
    let numbers = HeaderValue::from_static("application/octet-stream");
    response.headers_mut().insert(CONTENT_TYPE, numbers);
    response
}

fn json(text: String) -> Response {
    ([(CONTENT_TYPE, "application/json")], text).into_response()
}
