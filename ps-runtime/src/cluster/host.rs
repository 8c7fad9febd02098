//! The actor types that a process can make when another process asks for them.

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
///
/// For an example, see [`Hosts`].
pub trait Hosted: Remote {
    /// The arguments from which an actor is made. They are sent to the process that makes it.
    type Args: Serialize + DeserializeOwned + Send + 'static;

    /// Changes the options of actors of this type. `options` are those that were given to [`Hosts`].
    fn options(options: Spawn) -> Spawn {
        options
    }

    /// Tells an actor to finish its work, because its node is about to leave.
    ///
    /// Returns whether the actor will do so. If `true`, the actor is stopped gracefully, and its node waits
    /// for its end, but no longer than [`leave_grace`](super::ClusterConfig::leave_grace). If `false`, the
    /// default, the actor is killed when the node leaves. The default is right for actors whose state
    /// cannot continue elsewhere.
    ///
    /// ```
    /// # use actix::{Actor, Context, Handler, Message};
    /// # use ps_runtime::ActorRef;
    /// # use ps_runtime::cluster::Hosted;
    /// # use ps_runtime::remote::{Messages, Remote};
    /// # struct Searcher { is_over: bool }
    /// # impl Actor for Searcher { type Context = Context<Self>; }
    /// # #[derive(Message)]
    /// # #[rtype(result = "()")]
    /// # struct EndSoon;
    /// # impl Handler<EndSoon> for Searcher {
    /// #     type Result = ();
    /// #     fn handle(&mut self, _: EndSoon, _: &mut Context<Self>) { self.is_over = true; }
    /// # }
    /// # impl Remote for Searcher { fn messages(_: &mut Messages<Self>) {} }
    /// impl Hosted for Searcher {
    ///     type Args = ();
    ///
    ///     fn hand_over(actor: &ActorRef<Self>) -> bool {
    ///         // Its handler returns its best result so far.
    ///         actor.tell(EndSoon).is_ok()
    ///     }
    /// }
    ///
    /// let searcher = ps_runtime::spawn(|| Searcher { is_over: false });
    /// assert!(Searcher::hand_over(&searcher));
    /// ```
    fn hand_over(_actor: &ActorRef<Self>) -> bool {
        false
    }
}

/// The actor types that this program can host, each with a function that makes an actor.
///
/// All copies of the program build the same `Hosts` before they join. Other things that an actor needs,
/// such as its data, are loaded in the process that makes the actor.
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
/// One type can be hosted in several *variants*, for example one for each training of a sweep; see
/// [`host_variant`](Self::host_variant).
#[derive(Clone, Default)]
pub struct Hosts {
    /// By type, then by variant. [`host`](Self::host) adds the variant with the empty name.
    types: BTreeMap<&'static str, BTreeMap<String, Arc<dyn Host>>>,
    finders: BTreeMap<&'static str, FindHere>,
    /// The facts that must be the same in all processes, by name.
    facts: BTreeMap<String, Vec<String>>,
}

/// Looks for a living actor of one type.
type FindHere = fn(&Arc<Process>, &str) -> Option<Wire>;

/// The error of a function that makes an actor.
pub type MakeError = Box<dyn std::error::Error + Send + Sync>;

impl Hosts {
    /// Makes an empty `Hosts`.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Hosts actors of type `A`. `make` makes each actor on the actor's own thread, and again after a
    /// panic. [`Cluster::spawn`](super::Cluster::spawn) sends the arguments.
    ///
    /// ```
    /// # use actix::{Actor, Context, Handler, Message};
    /// # use ps_runtime::cluster::Hosted;
    /// # use ps_runtime::remote::{Messages, Remote};
    /// # use serde::{Deserialize, Serialize};
    /// # struct Counter(u64);
    /// # impl Actor for Counter { type Context = Context<Self>; }
    /// # #[derive(Message, Serialize, Deserialize)]
    /// # #[rtype(result = "u64")]
    /// # struct Add(u64);
    /// # impl Handler<Add> for Counter {
    /// #     type Result = u64;
    /// #     fn handle(&mut self, Add(n): Add, _: &mut Context<Self>) -> u64 { self.0 += n; self.0 }
    /// # }
    /// # impl Remote for Counter {
    /// #     fn messages(messages: &mut Messages<Self>) { messages.add::<Add>(); }
    /// # }
    /// # impl Hosted for Counter { type Args = u64; }
    /// use ps_runtime::cluster::{Cluster, Hosts};
    ///
    /// let hosts = Hosts::new().host(|start: u64| Ok(Counter(start)));
    /// let cluster = Cluster::alone(hosts);
    /// let counter = cluster.spawn::<Counter>(40).wait()?;
    /// assert_eq!(counter.ask(Add(2)).wait()?, 42);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn host<A: Hosted>(
        self,
        make: impl Fn(A::Args) -> Result<A, MakeError> + Send + Sync + 'static,
    ) -> Self {
        self.host_with(Spawn::new(), make)
    }

    /// Hosts actors of type `A` with these options. The caller of
    /// [`Cluster::spawn_with`](super::Cluster::spawn_with) gives each actor its name.
    #[must_use]
    pub fn host_with<A: Hosted>(
        self,
        options: Spawn,
        make: impl Fn(A::Args) -> Result<A, MakeError> + Send + Sync + 'static,
    ) -> Self {
        self.host_variant("", options, make)
    }

    /// Hosts actors of type `A` under the name of a variant. Each variant has its own options and its own
    /// `make`, for example with other data. [`SpawnOn::variant`](super::SpawnOn::variant) asks for a
    /// variant. If none is asked for and only one variant is hosted, that one is used.
    ///
    /// ```
    /// # use actix::{Actor, Context, Handler, Message};
    /// # use ps_runtime::cluster::Hosted;
    /// # use ps_runtime::remote::{Messages, Remote};
    /// # use serde::{Deserialize, Serialize};
    /// # struct Counter(u64);
    /// # impl Actor for Counter { type Context = Context<Self>; }
    /// # #[derive(Message, Serialize, Deserialize)]
    /// # #[rtype(result = "u64")]
    /// # struct Add(u64);
    /// # impl Handler<Add> for Counter {
    /// #     type Result = u64;
    /// #     fn handle(&mut self, Add(n): Add, _: &mut Context<Self>) -> u64 { self.0 += n; self.0 }
    /// # }
    /// # impl Remote for Counter {
    /// #     fn messages(messages: &mut Messages<Self>) { messages.add::<Add>(); }
    /// # }
    /// # impl Hosted for Counter { type Args = u64; }
    /// use ps_runtime::Spawn;
    /// use ps_runtime::cluster::{Cluster, Hosts, SpawnOn};
    ///
    /// let hosts = Hosts::new()
    ///     .host_variant("small", Spawn::new(), |start: u64| Ok(Counter(start)))
    ///     .host_variant("large", Spawn::new(), |start: u64| Ok(Counter(start + 1000)));
    /// let cluster = Cluster::alone(hosts);
    /// let counter = cluster.spawn_with::<Counter>(SpawnOn::new().variant("large"), 1).wait()?;
    /// assert_eq!(counter.ask(Add(0)).wait()?, 1001);
    /// // There are two variants, so one must be named.
    /// assert!(cluster.spawn::<Counter>(1).wait().is_err());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
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

    /// Hosts values of type `T` that other processes send to this process; see
    /// [`RemoteRef::new_on`](super::RemoteRef::new_on).
    ///
    /// ```
    /// use ps_runtime::cluster::{Cluster, Hosts, RemoteRef, SpawnOn, Value};
    /// use serde::{Deserialize, Serialize};
    ///
    /// #[derive(Clone, Serialize, Deserialize)]
    /// struct Names(Vec<String>);
    ///
    /// impl Value for Names {}
    ///
    /// let cluster = Cluster::alone(Hosts::new().values::<Names>());
    /// let names = Names(vec!["one".to_owned()]);
    /// let names = RemoteRef::new_on(&cluster, SpawnOn::new(), names).wait()?;
    /// assert_eq!(names.fetch().wait()?.0, ["one"]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn values<T: Value>(self) -> Self {
        self.host_with(Owned::<T>::options(), |value: T| Ok(Owned::new(value)))
    }

    /// Lets other processes find actors of type `A` by name, even if this process has started them
    /// itself. A type that is hosted is found anyway.
    ///
    /// ```
    /// # use actix::{Actor, Context, Handler, Message};
    /// # use ps_runtime::cluster::Hosted;
    /// # use ps_runtime::remote::{Messages, Remote};
    /// # use serde::{Deserialize, Serialize};
    /// # struct Counter(u64);
    /// # impl Actor for Counter { type Context = Context<Self>; }
    /// # #[derive(Message, Serialize, Deserialize)]
    /// # #[rtype(result = "u64")]
    /// # struct Add(u64);
    /// # impl Handler<Add> for Counter {
    /// #     type Result = u64;
    /// #     fn handle(&mut self, Add(n): Add, _: &mut Context<Self>) -> u64 { self.0 += n; self.0 }
    /// # }
    /// # impl Remote for Counter {
    /// #     fn messages(messages: &mut Messages<Self>) { messages.add::<Add>(); }
    /// # }
    /// # impl Hosted for Counter { type Args = u64; }
    /// use ps_runtime::Spawn;
    /// use ps_runtime::cluster::{Cluster, ClusterConfig, Hosts};
    ///
    /// // This process starts the counter itself. Nodes could not make one, but can find it.
    /// let visits = Spawn::new().name("visits of the driver").start(|| Counter(40))?;
    /// let cluster = Cluster::alone(Hosts::new().find::<Counter>());
    /// let found = cluster.lookup::<Counter>("visits of the driver").wait();
    /// assert_eq!(found.expect("it is alive").ask(Add(2)).wait()?, 42);
    /// # drop(visits);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn find<A: Remote>(mut self) -> Self {
        self.finders.insert(type_name::<A>(), find_here::<A>);
        self
    }

    /// States a fact that must be the same in all processes, such as the size of the data set that each
    /// process has loaded. A node whose fact differs from the driver's cannot join. If a name is stated
    /// several times, all its values are compared, in their order.
    ///
    /// ```
    /// use ps_runtime::cluster::{Cluster, ClusterConfig, Hosts, Node};
    ///
    /// let hosts = |num_examples: usize| Hosts::new().must_agree("number of examples", num_examples);
    /// let local = ([127, 0, 0, 1], 0).into();
    /// let cluster = Cluster::listen(ClusterConfig::default(), local, hosts(60_000))?;
    /// let driver = cluster.address().expect("it has a TCP socket").to_string();
    ///
    /// let node = Node::new(ClusterConfig::default(), 1, 0, driver, hosts(1_000));
    /// let error = node.serve().wait().expect_err("the node has other data");
    /// assert!(error.to_string().contains("number of examples"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn must_agree(mut self, name: impl Into<String>, value: impl ToString) -> Self {
        let values = self.facts.entry(name.into()).or_default();
        let value = value.to_string();
        if !values.contains(&value) {
            values.push(value);
        }
        self
    }

    /// The names of what was stated with [`must_agree`](Self::must_agree), in alphabetical order.
    ///
    /// ```
    /// use ps_runtime::cluster::Hosts;
    ///
    /// let hosts = Hosts::new().must_agree("seed", 1).must_agree("batch size", 64);
    /// assert!(hosts.agreed().eq(["batch size", "seed"]));
    /// ```
    pub fn agreed(&self) -> impl Iterator<Item = &str> {
        self.facts.keys().map(String::as_str)
    }

    pub(crate) fn facts(&self) -> BTreeMap<String, String> {
        let facts = self.facts.iter();
        facts
            .map(|(name, values)| (name.clone(), values.join(", then ")))
            .collect()
    }

    /// Returns the host for this type and variant. Without a variant, it returns the only one there is.
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

/// The arguments of an actor, as bytes.
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
    /// Lets the actor finish its work and stops it. Returns `false` if it does not hand over.
    pub(crate) hand_over: Box<dyn Fn() -> bool + Send + Sync>,
    pub(crate) ended: watch::Receiver<bool>,
}

/// An actor type, as the agent of a process sees it.
pub(crate) trait Host: Send + Sync {
    /// Makes an actor. The future is ready when the actor's constructor has returned.
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
                // At a restart nobody waits for the outcome.
                sender.map(|sender| sender.send(outcome)).is_some()
            };
            let factory = {
                let process = Arc::clone(&process);
                let may_restart = options.may_restart();
                let mut args = Some(args);
                move || {
                    lookup::enter(&process);
                    // The arguments of a server are its first weights. They are large, so they are kept
                    // only if a restart may need them.
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
                            // Ends this start like a panic, but without a panic message. A first start
                            // that failed is not tried again.
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
            // The closure holds no reference, because that would keep the actor alive.
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

/// An actor that is being made. It is killed if nobody waits for it any more.
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
