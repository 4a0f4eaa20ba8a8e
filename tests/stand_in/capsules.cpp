// Functions of C whose work is Python's. SOURCE: for each of them, as signatures differ, a line that calls `ask`.
#include <cstddef>
#include <cstdint>

struct PyObject;
typedef int CUdevice;
extern "C" PyObject *PyObject_CallFunction(PyObject *, const char *, ...);
extern "C" long PyLong_AsLong(PyObject *);
extern "C" void Py_DecRef(PyObject *);
extern "C" PyObject *answers[64];
PyObject *answers[64];

// What was raised stays raised: an integer is then 0.
struct Answer {
    PyObject *object;
    operator PyObject *() { return object; }
    template <class Integer> operator Integer()
    {
        long value = object ? PyLong_AsLong(object) : 0;
        if (object)
            Py_DecRef(object);
        return (Integer)value;
    }
};
template <class... Arguments> static Answer ask(int which, const char *format, Arguments... arguments)
{
    return {PyObject_CallFunction(answers[which], format, arguments...)};
}
#include SOURCE
