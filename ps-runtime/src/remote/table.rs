//! The messages of an actor type, each with the functions that write, read and run it.

use std::any::{Any, TypeId, type_name};
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use actix::{Actor, Context, Handler, Message};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Remote;
use super::callee::{self, Incoming, Then};
use super::kept::Kept;
use super::reference::Remotely;
use crate::actor::mailbox::Mailbox;
use crate::actor::port::{Begun, How};
use crate::buffer::Buffer;
use crate::codec::{CodecError, Encoded, decode, encode};
use crate::schema::Schema;

/// Collects the messages of an actor type; see [`Remote::messages`].
///
/// For an example, see [`Remote`].
pub struct Messages<A: Actor> {
    by_code: Vec<Serve<A>>,
    by_type: HashMap<TypeId, Known<A>>,
    /// The structure of all types. It tells builds of a program apart.
    schema: Schema,
    untraced: Vec<&'static str>,
}

/// Reads a message, hands it to the actor, and sends the reply.
type Serve<A> = fn(&Arc<Mailbox<A>>, Incoming, Then);

/// Begins a call with a message of a type that only it knows; see [`Port::begin`].
type Begin<A> = fn(&Remotely<A>, &mut dyn Any, How) -> Option<Box<dyn Any>>;

fn begin<A, M>(remote: &Remotely<A>, message: &mut dyn Any, how: How) -> Option<Box<dyn Any>>
where
    A: Actor,
    M: Message + Send + 'static,
    M::Result: Send,
{
    let message = message.downcast_mut::<Option<M>>()?.take()?;
    let call = remote.actor.call(&remote.table, message, how);
    let begun: Begun<M> = call.map(|call| call as _);
    Some(Box::new(begun))
}

/// The bit of a message's code that asks to keep the result.
const KEEP: u32 = 1 << 31;

struct Known<A: Actor> {
    code: u32,
    begin: Begin<A>,
    /// A [`Codec<M>`].
    codec: Box<dyn Any + Send + Sync>,
}

pub(crate) type Decode<T> = fn(&[u8], Vec<Buffer>) -> Result<T, CodecError>;

/// The functions with which a caller writes a message and reads its result.
pub(crate) struct Codec<M: Message> {
    pub(crate) encode: fn(&M) -> Result<Encoded, CodecError>,
    pub(crate) decode: Decode<M::Result>,
    pub(crate) decode_kept: Decode<Kept<M::Result>>,
}

impl<M: Message> Clone for Codec<M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<M: Message> Copy for Codec<M> {}

impl<A: Actor<Context = Context<A>>> Messages<A> {
    /// Lets other processes send `M`. Adding it twice changes nothing.
    pub fn add<M>(&mut self) -> &mut Self
    where
        A: Handler<M>,
        M: Message + Serialize + DeserializeOwned + Send + 'static,
        M::Result: Serialize + DeserializeOwned + Send,
    {
        if self.by_type.contains_key(&TypeId::of::<M>()) {
            return self;
        }
        let code = self.by_code.len() as u32;
        let codec: Codec<M> = Codec {
            encode: encode::<M>,
            decode: decode::<M::Result>,
            decode_kept: decode::<Kept<M::Result>>,
        };
        self.by_type.insert(
            TypeId::of::<M>(),
            Known {
                code,
                begin: begin::<A, M>,
                codec: Box::new(codec),
            },
        );
        self.by_code.push(callee::serve::<A, M>);
        self.look_at::<M>();
        self.look_at::<M::Result>();
        self
    }

    fn look_at<T: DeserializeOwned>(&mut self) {
        if !self.schema.add::<T>() {
            self.untraced.push(type_name::<T>());
        }
    }
}

impl<A: Actor> Messages<A> {
    fn new() -> Self {
        Self {
            by_code: Vec::new(),
            by_type: HashMap::new(),
            schema: Schema::new(),
            untraced: Vec::new(),
        }
    }
}

/// Returns the messages and results of an actor type of which only name and size are compared when two
/// processes connect.
///
/// For all other types the fields are compared, too. The `Deserialize` of the returned types refuses the
/// made-up values that are used to find the fields. So for these types two different builds may connect
/// and misread each other's bytes. A test can check that this list is empty.
///
/// ```
/// # use actix::{Actor, Context, Handler, Message};
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
/// use ps_runtime::remote::untraced;
///
/// assert!(untraced::<Counter>().is_empty());
/// ```
pub fn untraced<A: Remote>() -> Vec<&'static str> {
    Table::<A>::get().messages.untraced.clone()
}

impl<A: Actor> fmt::Debug for Messages<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Messages<{}>({})", type_name::<A>(), self.by_code.len())
    }
}

/// The finished list.
pub(crate) struct Table<A: Actor> {
    messages: Messages<A>,
    schema: u64,
}

/// The code of a message whose result is to be kept.
pub(crate) fn keeping(code: u32) -> u32 {
    code | KEEP
}

impl<A: Remote> Table<A> {
    /// The table of an actor type, made at first use.
    pub(crate) fn get() -> Arc<Self> {
        static TABLES: LazyLock<Mutex<HashMap<TypeId, Arc<dyn Any + Send + Sync>>>> =
            LazyLock::new(Mutex::default);

        let found = {
            // Each operation on the map is whole.
            let tables = TABLES.lock().unwrap_or_else(PoisonError::into_inner);
            tables.get(&TypeId::of::<A>()).cloned()
        };
        if let Some(Ok(table)) = found.map(Arc::downcast) {
            return table;
        }
        // Outside the lock, because `messages` is the user's code. If it is made twice, both are equal.
        let mut messages = Messages::new();
        messages.schema.write(type_name::<A>());
        A::messages(&mut messages);
        let schema = messages.schema.finish();
        let table = Arc::new(Self { messages, schema });
        let mut tables = TABLES.lock().unwrap_or_else(PoisonError::into_inner);
        tables.insert(TypeId::of::<A>(), Arc::clone(&table) as _);
        table
    }
}

impl<A: Actor> Table<A> {
    /// A table that knows no messages.
    pub(super) fn empty() -> Arc<Self> {
        let messages = Messages::new();
        let schema = messages.schema.finish();
        Arc::new(Self { messages, schema })
    }

    pub(crate) fn schema(&self) -> u64 {
        self.schema
    }

    /// Returns the code of `M` and how to write it and read its result, if the actor takes `M`.
    pub(crate) fn codec<M: Message + 'static>(&self) -> Option<(u32, Codec<M>)> {
        let known = self.messages.by_type.get(&TypeId::of::<M>())?;
        let codec = known.codec.downcast_ref::<Codec<M>>()?;
        Some((known.code, *codec))
    }

    /// Begins a call, if the actor takes the message, which is an `Option<M>`.
    pub(super) fn begin(
        &self,
        remote: &Remotely<A>,
        id: TypeId,
        message: &mut dyn Any,
        how: How,
    ) -> Option<Box<dyn Any>> {
        let known = self.messages.by_type.get(&id)?;
        (known.begin)(remote, message, how)
    }

    /// How many messages the actor takes from other processes.
    #[cfg(any(test, feature = "test-util"))]
    pub(crate) fn num_messages(&self) -> u32 {
        self.messages.by_code.len() as u32
    }

    /// Runs the message with this code.
    pub(crate) fn serve(&self, mailbox: &Arc<Mailbox<A>>, code: u32, incoming: Incoming) {
        let then = match (code & KEEP, incoming.is_told()) {
            (_, true) => Then::Forget,
            (0, false) => Then::Send,
            (_, false) => Then::Keep,
        };
        match self.messages.by_code.get((code & !KEEP) as usize) {
            Some(serve) => serve(mailbox, incoming, then),
            None => incoming.refuse(format!("{} has no message {code}", type_name::<A>())),
        }
    }
}
