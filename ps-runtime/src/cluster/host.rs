//! The actor types that a process can make when another one asks it to.

use std::any::type_name;
use std::collections::BTreeMap;
use std::fmt;
use std::panic::resume_unwind;
use std::sync::{Arc, Mutex};

use futures_util::future::BoxFuture;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::{oneshot, watch};

use super::agent::SpawnRefused;
use super::lookup;
use super::value::{Owned, Value};
use crate::actor::error::error_chain;
use crate::actor::supervisor::NotMade;
use crate::actor::{self, ActorRef, Spawn};
use crate::codec::{self, Blob, CodecError};
use crate::remote::Remote;
use crate::remote::process::Process;
use crate::remote::reference::{Wire, on_behalf_of};

/// An actor type that a [`Cluster`](super::Cluster) can start in another process.
pub trait Hosted: Remote {
    /// What an actor is made of; it is sent to the process that makes it.
    type Args: Serialize + DeserializeOwned + Send + 'static;

    /// Adds to the options that [`Hosts`] has for actors of this type what each of them needs.
    fn options(options: Spawn) -> Spawn {
        options
    }

    /// Tells an actor to finish what it does, because its node is to leave.
    ///
    /// Returns whether it does: then it is stopped, and its node waits for that, no longer than
    /// [`leave_grace`](super::ClusterConfig::leave_grace). By default it does not, and is killed
    /// when the node leaves: right for actors that hold what nobody else has.
    fn hand_over(_actor: &ActorRef<Self>) -> bool {
        false
    }
}

/// The actor types that this program can host, each with how to make one.
///
/// All copies of the program build the same `Hosts` before they join; what else an actor needs,
/// such as its data, is loaded where it is made.
///
/// ```
/// # use actix::{Actor, Context};
/// # use ps_runtime::cluster::{Hosted, Hosts};
/// # use ps_runtime::remote::{Messages, Remote};
/// # struct Counter(u64);
/// # impl Actor for Counter { type Context = Context<Self>; }
/// # impl Remote for Counter { fn messages(_: &mut Messages<Self>) {} }
/// impl Hosted for Counter {
///     type Args = u64;
/// }
///
/// let hosts = Hosts::new().host(|start: u64| Ok(Counter(start)));
/// ```
///
/// One type can be hosted in several *variants*, say for each training of a sweep: see
/// [`host_variant`](Self::host_variant).
#[derive(Clone, Default)]
pub struct Hosts {
    /// By type, then by variant; the one without a name is that of [`host`](Self::host).
    types: BTreeMap<&'static str, BTreeMap<String, Arc<dyn Host>>>,
    finders: BTreeMap<&'static str, FindHere>,
    /// What must be the same in all processes, by name.
    facts: BTreeMap<String, Vec<String>>,
}

/// Looks for a living actor of one type.
type FindHere = fn(&Arc<Process>, &str) -> Option<Wire>;

/// The error of a function that makes an actor.
pub type MakeError = Box<dyn std::error::Error + Send + Sync>;

impl Hosts {
    /// Hosts nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Hosts actors of type `A`, made by `make` on their own thread, and again after a panic.
    #[must_use]
    pub fn host<A: Hosted>(
        self,
        make: impl Fn(A::Args) -> Result<A, MakeError> + Send + Sync + 'static,
    ) -> Self {
        self.host_with(Spawn::new(), make)
    }

    /// Hosts actors with these options; a name is given to each by whoever spawns it.
    #[must_use]
    pub fn host_with<A: Hosted>(
        self,
        options: Spawn,
        make: impl Fn(A::Args) -> Result<A, MakeError> + Send + Sync + 'static,
    ) -> Self {
        self.host_variant("", options, make)
    }

    /// Hosts actors of type `A` that are to be made in a way of their own, besides other variants:
    /// with other data, for instance. [`SpawnOn::variant`](super::SpawnOn::variant) asks for one. Who
    /// asks for none gets the only one there is.
    #[must_use]
    pub fn host_variant<A: Hosted>(
        mut self,
        variant: impl Into<String>,
        options: Spawn,
        make: impl Fn(A::Args) -> Result<A, MakeError> + Send + Sync + 'static,
    ) -> Self {
        let host = Make::<A> {
            options: A::options(options),
            make: Arc::new(make),
        };
        let variants = self.types.entry(type_name::<A>()).or_default();
        variants.insert(variant.into(), Arc::new(host));
        self.find::<A>()
    }

    /// Looks after values of type `T` that other processes send here; see
    /// [`RemoteRef::new_on`](super::RemoteRef::new_on).
    #[must_use]
    pub fn values<T: Value>(self) -> Self {
        self.host_with(Owned::<T>::options(), |value: T| Ok(Owned::new(value)))
    }

    /// Lets other processes find actors of type `A` by name that this one has started itself.
    #[must_use]
    pub fn find<A: Remote>(mut self) -> Self {
        self.finders.insert(type_name::<A>(), find_here::<A>);
        self
    }

    /// States something that must be the same in all processes, such as the size of the data set each
    /// has loaded by itself. A node that says otherwise than the driver is not let in. A name that is
    /// stated several times stands for all its values, in their order.
    #[must_use]
    pub fn must_agree(mut self, name: impl Into<String>, value: impl ToString) -> Self {
        let values = self.facts.entry(name.into()).or_default();
        let value = value.to_string();
        if !values.contains(&value) {
            values.push(value);
        }
        self
    }

    pub(crate) fn facts(&self) -> BTreeMap<String, String> {
        let facts = self.facts.iter();
        facts
            .map(|(name, values)| (name.clone(), values.join(", then ")))
            .collect()
    }

    /// The actor type that is asked for; without a variant, the only one there is.
    pub(crate) fn get(
        &self,
        type_name: &str,
        variant: Option<&str>,
    ) -> Result<Arc<dyn Host>, SpawnRefused> {
        let Some(variants) = self.types.get(type_name) else {
            return Err(SpawnRefused::NotHosted {
                type_name: type_name.to_owned(),
                hosted: self.names().join(", "),
            });
        };
        let names = || {
            let names = variants.keys().map(String::as_str);
            let names = names.map(|name| {
                if name.is_empty() {
                    "one without a name"
                } else {
                    name
                }
            });
            names.collect::<Vec<_>>().join(", ")
        };
        match (variant, variants.len()) {
            (Some(variant), _) => {
                let found = variants.get(variant).cloned();
                found.ok_or_else(|| SpawnRefused::OtherVariants {
                    type_name: type_name.to_owned(),
                    variant: variant.to_owned(),
                    hosted: names(),
                })
            }
            (None, 1) => Ok(variants.values().next().cloned().expect("there is one")),
            (None, _) => Err(SpawnRefused::Ambiguous {
                type_name: type_name.to_owned(),
                hosted: names(),
            }),
        }
    }

    pub(crate) fn find_actor(
        &self,
        process: &Arc<Process>,
        type_name: &str,
        name: &str,
    ) -> Option<Wire> {
        self.finders.get(type_name)?(process, name)
    }

    pub(crate) fn names(&self) -> Vec<&'static str> {
        self.types.keys().copied().collect()
    }
}

impl fmt::Debug for Hosts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.types.keys()).finish()
    }
}

/// Arguments on their way.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Args(Blob);

impl Args {
    pub(crate) fn write<T: Serialize>(
        process: &Arc<Process>,
        args: &T,
    ) -> Result<Self, CodecError> {
        Ok(Self(on_behalf_of(process, || codec::encode(args))?.into()))
    }

    fn read<T: DeserializeOwned>(self, process: &Arc<Process>) -> Result<T, CodecError> {
        on_behalf_of(process, || self.0.read())
    }
}

/// An actor that was made for another process.
pub(crate) struct Made {
    pub(crate) wire: Wire,
    pub(crate) name: Arc<str>,
    pub(crate) kill: Box<dyn Fn() + Send + Sync>,
    /// Lets it finish what it does, and stops it; false if it does not hand over.
    pub(crate) hand_over: Box<dyn Fn() -> bool + Send + Sync>,
    pub(crate) ended: watch::Receiver<bool>,
}

/// An actor type, as the agent of a process sees it.
pub(crate) trait Host: Send + Sync {
    /// Makes an actor; ready when its constructor has returned.
    fn make(
        &self,
        process: &Arc<Process>,
        args: Args,
        name: Option<String>,
    ) -> BoxFuture<'static, Result<Made, String>>;
}

struct Make<A: Hosted> {
    options: Spawn,
    make: Arc<dyn Fn(A::Args) -> Result<A, MakeError> + Send + Sync>,
}

impl<A: Hosted> Host for Make<A> {
    fn make(
        &self,
        process: &Arc<Process>,
        args: Args,
        name: Option<String>,
    ) -> BoxFuture<'static, Result<Made, String>> {
        let options = match name {
            Some(name) => self.options.clone().name(name),
            None => self.options.clone(),
        };
        let make = Arc::clone(&self.make);
        let process = Arc::clone(process);
        Box::pin(async move {
            let (sender, first) = oneshot::channel::<Result<(), String>>();
            let sender = Mutex::new(Some(sender));
            let report = move |outcome| {
                let sender = sender.lock().ok().and_then(|mut sender| sender.take());
                // Nobody waits at a restart.
                sender.map(|sender| sender.send(outcome)).is_some()
            };
            let factory = {
                let process = Arc::clone(&process);
                let may_restart = options.may_restart();
                let mut args = Some(args);
                move || {
                    lookup::enter(&process);
                    // Of a server they are its first weights: who is made once does not keep them.
                    let given = if may_restart {
                        args.clone()
                    } else {
                        args.take()
                    };
                    let made = given
                        .expect("an actor that is never restarted is made once")
                        .read(&process)
                        .map_err(|error| error_chain(&error))
                        .and_then(|args| make(args).map_err(|error| error_chain(&*error)));
                    match made {
                        Ok(actor) => {
                            report(Ok(()));
                            actor
                        }
                        Err(why) => {
                            // Ends this start as a panic does, without its noise. A first start that
                            // failed is not tried again.
                            match report(Err(why.clone())) {
                                true => resume_unwind(Box::new(NotMade(why))),
                                false => resume_unwind(Box::new(why)),
                            }
                        }
                    }
                }
            };
            let actor = options
                .start(factory)
                .map_err(|error| error_chain(&error))?;
            let unclaimed = Unclaimed(Some(actor));
            match first.await {
                Ok(Ok(())) => {}
                Ok(Err(why)) => return Err(why),
                Err(_) => return Err("it panicked when it was made".to_owned()),
            }
            let actor = unclaimed.claim();
            let wire = process.export(&actor);
            let mailbox = Arc::clone(actor.mailbox_here());
            let (name, ended) = (Arc::clone(mailbox.name()), mailbox.ended());
            let kill = Box::new(move || mailbox.kill());
            let number = wire.actor;
            // Without a reference, which would keep the actor.
            let hand_over = Box::new(move || {
                let actor = process.exported::<A>(number);
                let handed_over = actor.filter(A::hand_over);
                handed_over.map(|actor| actor.stop()).is_some()
            });
            Ok(Made {
                wire,
                name,
                kill,
                hand_over,
                ended,
            })
        })
    }
}

/// An actor that is being made; it ends if nobody waits for it any more.
struct Unclaimed<A: Hosted>(Option<ActorRef<A>>);

impl<A: Hosted> Unclaimed<A> {
    fn claim(mut self) -> ActorRef<A> {
        self.0.take().expect("it is claimed once")
    }
}

impl<A: Hosted> Drop for Unclaimed<A> {
    fn drop(&mut self) {
        if let Some(actor) = self.0.take() {
            actor.kill();
        }
    }
}

fn find_here<A: Remote>(process: &Arc<Process>, name: &str) -> Option<Wire> {
    let actor = actor::lookup::<A>(name).ok()?;
    Some(process.export(&actor))
}
